"""Negatives listed for each query (hard negatives), as columns of this rank: their scores, the mask, their gradients.

Shape legend: m queries, n columns and k listed negatives per query of this rank, D vector size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.losses.inputs import LossInputs
from bigdssm.losses.passes import Gradients

_CHUNK_ELEMENTS = 1 << 22  # of the negatives' vectors at a time


@dataclass
class Listed:
    """Scores float64 [m, k], −inf where there is no negative or it is masked; `used_mk` says where there is one."""

    column_mk: Tensor  # int64, 0 where unused
    used_mk: Tensor
    score_mk: Tensor
    num_listed: int
    num_masked: int


def score_listed(x: LossInputs, negatives_mk: Tensor, known_mk: Tensor) -> Listed:
    """Score the listed negatives; `known_mk` says which are known positives of their queries."""
    there, column = negatives_mk >= 0, negatives_mk.clamp(min=0)
    masked = there & known_mk & (column != x.positive[:, None])
    used = there & ~known_mk & (column != x.positive[:, None])
    score = torch.full(column.shape, -math.inf, dtype=torch.float64, device=column.device)
    alpha = float(x.alpha.detach())
    for rows, vectors in _chunks(x, column):
        score[rows] = torch.einsum("md,mkd->mk", x.U.detach()[rows].to(x.acc), vectors).double() * alpha
    for bias in (x.beta, x.neg_bias) if x.W.shape[0] else ():
        score = score if bias is None else score + bias.detach().double()[column]
    score = torch.where(used, score, -math.inf)
    return Listed(column, used, score, int(there.sum()), int(masked.sum()))


def add_listed(x: LossInputs, listed: Listed, G_mk: Tensor, sums: Gradients) -> None:
    """Add the listed negatives' G to the sums of this rank's vectors and biases."""
    G = G_mk.to(x.acc)
    for rows, vectors in _chunks(x, listed.column_mk):
        if sums.U is not None:
            sums.U[rows] += torch.einsum("mk,mkd->md", G[rows], vectors)
        if sums.W is not None:
            spread = G[rows][:, :, None] * x.U.detach()[rows].to(x.acc)[:, None, :]
            sums.W.index_add_(0, listed.column_mk[rows].flatten(), spread.flatten(0, 1))
    if sums.beta is not None:
        sums.beta.index_add_(0, listed.column_mk.flatten(), G_mk.flatten().to(sums.beta.dtype))


def _chunks(x: LossInputs, column_mk: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their negatives' vectors [rows, k, D])."""
    k, D = column_mk.shape[1], x.W.shape[1]
    height = max(1, _CHUNK_ELEMENTS // max(1, k * D))
    for start in range(0, column_mk.shape[0] if k else 0, height):
        rows = slice(start, start + height)
        yield rows, x.W.detach()[column_mk[rows]].to(x.acc)
