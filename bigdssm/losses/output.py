"""What a loss returns, and how its hand-made gradients reach autograd.

Scale: every rank returns the loss of the global batch, and gradients world_size times its share, so that the mean over
ranks that DeepSpeed and DDP take of a parameter's gradient is the gradient of the global loss.

Shape legend: m queries and n columns of this rank, N slots, D vector size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.columns import Columns
from bigdssm.losses.inputs import Facts, LossInputs
from bigdssm.losses.masks import DropPlan
from bigdssm.losses.tiles import Sums


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar, the same on every rank; `stats`: scalars without gradient, over all ranks.

    in_batch_accuracy: share of the queries of weight > 0 whose positive scores above all their negatives, as the loss
    scores them; dropped_fraction: share of all entries but the positives that the masks drop; effective_negatives:
    negatives left per query; lse_min, lse_max: range of the log-sum-exps (for losses without one, of the queries' best
    scores).
    """

    loss: Tensor
    stats: dict[str, Tensor]


@dataclass
class LocalStats:
    """One rank's part of the loss and of the statistics."""

    loss_sum: Tensor
    correct: Tensor
    judged: Tensor
    dropped: float
    entries: float
    queries: float
    lse: Tensor


def weighted(weight_m: Tensor, values_m: Tensor) -> Tensor:
    """Return weight · value, 0 where the weight is 0 whatever the value."""
    return torch.where(weight_m > 0, weight_m * values_m, 0.0)


def local_stats(
    x: LossInputs,
    columns: Columns,
    drops: DropPlan,
    terms_m: Tensor,
    positive_m: Tensor,
    largest_m: Tensor,
    lse: Tensor,
) -> LocalStats:
    """Collect this rank's part; `terms_m` are weighted, `largest_m` the best negatives' scores, `lse` any shape."""
    m = x.U.shape[0]
    used = x.weight > 0
    positive_slots = x.positive + columns.own_start
    own = drops.contains(torch.arange(m, device=positive_slots.device), positive_slots)
    return LocalStats(
        loss_sum=terms_m.sum(),
        correct=((positive_m > largest_m) & used).sum(),
        judged=used.sum(),
        dropped=float(drops.row_lengths.sum() - own.sum()),
        entries=float(m) * (columns.num_columns - 1),
        queries=float(m),
        lse=lse,
    )


def reduce_output(local: LocalStats, weight_sum: float, group: Group | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the global loss and statistics: two small all-reduces."""
    device = local.loss_sum.device
    totals = torch.stack([
        local.loss_sum.double(), local.correct.double(), local.judged.double(),
        *torch.tensor([local.dropped, local.entries, local.queries], dtype=torch.float64, device=device),
    ])  # fmt: skip
    distributed.all_reduce(totals, "sum", group)
    ends = [-local.lse.min(), local.lse.max()] if local.lse.numel() else [totals.new_tensor(-math.inf)] * 2
    extremes = distributed.all_reduce(torch.stack(ends).double(), "max", group)
    loss = totals[0] / weight_sum if weight_sum > 0 else torch.zeros_like(totals[0])
    stats = {
        "in_batch_accuracy": totals[1] / totals[2].clamp(min=1),
        "dropped_fraction": totals[3] / totals[4].clamp(min=1),
        "effective_negatives": (totals[4] - totals[3]) / totals[5].clamp(min=1),
        "lse_min": -extremes[0],
        "lse_max": extremes[1],
    }
    return loss, stats


@dataclass
class Gradients:
    """For this rank's U [m, D], W [n, D], alpha (scalar) and beta [n]; None where not wanted."""

    U: Tensor | None = None
    W: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None


def reduce_sums(sums: Sums, num_columns: int, group: Group | None) -> Gradients:
    """Bring each rank the sums of its own columns."""
    grads = Gradients(U=sums.dU_mD)
    if sums.dW_ND is not None:
        grads.W = distributed.reduce_scatter_rows(sums.dW_ND, group)[:num_columns]
    if sums.dbeta_N is not None:
        grads.beta = distributed.reduce_scatter_rows(sums.dbeta_N, group)[:num_columns]
    return grads


def finish_gradients(x: LossInputs, facts: Facts, sums: Gradients, pull_m: Tensor, beta_pull_m: Tensor) -> Gradients:
    """Turn sums over G into gradients of the global loss times world_size, in place.

    `pull_m` is minus the gradient of each query's positive score, `beta_pull_m` the part of it that concerns beta.
    """
    factor = facts.world_size / facts.weight_sum if facts.weight_sum > 0 else 0.0
    alpha = float(x.alpha.detach())
    pull_m1 = pull_m.to(x.acc)[:, None]
    U_mD = x.U.detach().to(x.acc)
    grads = Gradients()
    if sums.U is not None:
        sums.U.addcmul_(x.W.detach()[x.positive].to(x.acc), pull_m1, value=-1)
        grads.alpha = (sums.U * U_mD).sum(1).double().sum() * factor
        grads.U = sums.U.mul_(alpha * factor)
    if sums.W is not None:
        sums.W.index_add_(0, x.positive, U_mD * pull_m1, alpha=-1)
        grads.W = sums.W.mul_(alpha * factor)
    if sums.beta is not None:
        sums.beta.index_add_(0, x.positive, beta_pull_m.to(sums.beta.dtype), alpha=-1)
        grads.beta = sums.beta.mul_(factor)
    return grads


def attach(loss: Tensor, x: LossInputs, grads: Gradients | None) -> Tensor:
    """Return `loss` in the inputs' float dtype, with its gradients known to autograd."""
    value = loss.to(x.acc)
    if grads is None:
        return value
    pairs = [(x.U, grads.U), (x.W, grads.W), (x.alpha, grads.alpha), (x.beta, grads.beta)]
    given = [(tensor, grad) for tensor, grad in pairs if tensor is not None]
    with torch.enable_grad():
        result: Tensor = _Attach.apply(value, len(given), *(t for t, _ in given), *(g for _, g in given))
    return result


class _Attach(torch.autograd.Function):
    """The identity on a value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, num: int, *tensors_and_gradients: Tensor | None) -> Tensor:
        inputs, gradients = tensors_and_gradients[:num], tensors_and_gradients[num:]
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs if t is not None]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's once_differentiable lets it pass, as if the second derivative were 0
            raise NotImplementedError("the losses have no second derivatives: differentiate without create_graph")
        results: list[Tensor | None] = []
        for wanted, (shape, dtype, device), gradient in zip(
            ctx.needs_input_grad[2:], ctx.like, ctx.saved_tensors, strict=False
        ):
            if wanted and gradient is not None:
                results.append((gradient * upstream).to(device=device, dtype=dtype).view(shape))
            else:
                results.append(None)
        return None, None, *results, *[None] * len(ctx.like)
