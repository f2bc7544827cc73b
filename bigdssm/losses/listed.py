"""Negatives listed for each query (hard negatives), as columns of this rank: their scores, the mask, their gradients.

Shape legend: m queries, n columns and k listed negatives per query of this rank, D vector size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bigdssm.losses.inputs import LossInputs
from bigdssm.losses.passes import Gradients

_CHUNK_ELEMENTS = 1 << 22  # of the negatives' vectors at a time


def score_listed(x: LossInputs, alpha: float, column_mk: Tensor, used_mk: Tensor) -> Tensor:
    """Return the scores float64 [m, k] of the columns, −inf where not `used_mk`."""
    score = torch.full(column_mk.shape, -math.inf, dtype=torch.float64, device=column_mk.device)
    for rows, vectors in _chunks(x, column_mk):
        score[rows] = torch.einsum("md,mkd->mk", x.U.detach()[rows].to(x.acc), vectors).double() * alpha
    for bias in (x.beta, x.neg_bias) if x.W.shape[0] else ():
        score = score if bias is None else score + bias.detach().double()[column_mk]
    return torch.where(used_mk, score, -math.inf)


def add_listed(x: LossInputs, column_mk: Tensor, G_mk: Tensor, sums: Gradients) -> None:
    """Add the listed negatives' G to the sums of this rank's vectors and biases."""
    G = G_mk.to(x.acc)
    for rows, vectors in _chunks(x, column_mk):
        if sums.U is not None:
            sums.U[rows] += torch.einsum("mk,mkd->md", G[rows], vectors)
        if sums.W is not None:
            spread = G[rows][:, :, None] * x.U.detach()[rows].to(x.acc)[:, None, :]
            sums.W.index_add_(0, column_mk[rows].flatten(), spread.flatten(0, 1))
    if sums.beta is not None:
        sums.beta.index_add_(0, column_mk.flatten(), G_mk.flatten().to(sums.beta.dtype))


def _chunks(x: LossInputs, column_mk: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their negatives' vectors [rows, k, D])."""
    k, D = column_mk.shape[1], x.W.shape[1]
    height = max(1, _CHUNK_ELEMENTS // max(1, k * D))
    for start in range(0, column_mk.shape[0] if k else 0, height):
        rows = slice(start, start + height)
        yield rows, x.W.detach()[column_mk[rows]].to(x.acc)
