"""What goes beside the losses: weights from relevance, and a norm regulariser.

Shape legend: m queries of this rank, D vector size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.exchange import LossInputError


def relevance_weight(relevance: Tensor, kind: Literal["indicator", "relevance"]) -> Tensor:
    """Return the weights [m] from relevance: 1[r > 0], or r. Raises: LossInputError where r is negative or NaN."""
    good = relevance.isfinite() & (relevance >= 0)
    if relevance.device.type == "cpu" and not bool(good.all()):  # on a device that would be waited for
        raise LossInputError("relevance holds NaN, infinite or negative values")
    if kind == "indicator":
        return (relevance > 0).to(relevance.dtype if relevance.is_floating_point() else torch.float32)
    if kind == "relevance":
        return relevance.float() if not relevance.is_floating_point() else relevance
    raise LossInputError(f"weight must be indicator or relevance, got {kind!r}")


def norm_penalty(vectors: Tensor, copies: Tensor | None = None, group: Group | None = None) -> Tensor:
    """Return the mean squared norm over the vectors [rows, D] of all ranks; keeps `score: dot` from growing.

    copies [rows]: how many vectors were merged in each, so that it makes no difference which ranks merged them. Its
    scale is the losses': the same value on every rank, gradients whose mean over ranks is the global one.
    """
    squares = vectors.float().pow(2).sum(1) if vectors.dtype == torch.bfloat16 else vectors.pow(2).sum(1)
    weight = torch.ones_like(squares) if copies is None else copies.to(squares.dtype)
    return global_mean((squares * weight).sum(), weight.sum(), group)


def global_mean(own: Tensor, own_total: Tensor, group: Group | None) -> Tensor:
    """Return Σ own / Σ own_total over all ranks, with gradients world_size times this rank's share."""
    sums = torch.stack([own.detach().double(), own_total.detach().double()])
    distributed.all_reduce(sums, "sum", group)
    factor = torch.where(sums[1] > 0, distributed.world_size(group) / sums[1], 0.0)
    share = own * factor.to(own.dtype)
    return share + (torch.where(sums[1] > 0, sums[0] / sums[1], 0.0).to(own.dtype) - share.detach())
