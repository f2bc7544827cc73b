"""Negatives given per query, as columns of this rank: their scores, which of them are dropped, their gradients.

Shape legend: m queries, n columns and k given negatives per query of this rank, D vector size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import Facts, LossInputs
from bigdssm.losses.output import Gradients

_CHUNK_ELEMENTS = 1 << 22  # of the negatives' vectors at a time


@dataclass
class Given:
    """Scores [m, k] with −inf where there is no negative or it is dropped; `used` says where there is one."""

    column_mk: Tensor  # int64, 0 where unused
    used_mk: Tensor
    score_mk: Tensor  # float64
    num_listed: int
    num_dropped: int


def score_given(x: LossInputs, facts: Facts, negatives_mk: Tensor, group: Group | None) -> Given:
    """Score the listed negatives, without the known positives of their queries."""
    used = negatives_mk >= 0
    column = negatives_mk.clamp(min=0)
    known = used & _is_known_positive(x, facts, column, group)
    own = column == x.positive[:, None]
    keep = used & ~known & ~own
    score = torch.full(column.shape, -math.inf, dtype=torch.float64, device=column.device)
    alpha = float(x.alpha.detach())
    for rows, vectors in _chunks(x, column):
        score[rows] = torch.einsum("md,mkd->mk", x.U.detach()[rows].to(x.acc), vectors).double() * alpha
    beta = x.beta_of(column) if x.W.shape[0] else None
    score = score if beta is None else score + beta
    if x.neg_bias is not None and x.W.shape[0]:
        score += x.neg_bias.double()[column]
    score = torch.where(keep, score, -math.inf)
    return Given(column, keep, score, int(used.sum()), int((known & ~own).sum()))


def add_given(x: LossInputs, given: Given, G_mk: Tensor, grads: Gradients) -> None:
    """Add the given negatives' G to the sums of this rank's vectors and biases."""
    G = G_mk.to(x.acc)
    for rows, vectors in _chunks(x, given.column_mk):
        if grads.U is not None:
            grads.U[rows] += torch.einsum("mk,mkd->md", G[rows], vectors)
        if grads.W is not None:
            spread = G[rows][:, :, None] * x.U.detach()[rows].to(x.acc)[:, None, :]
            grads.W.index_add_(0, given.column_mk[rows].flatten(), spread.flatten(0, 1))
    if grads.beta is not None:
        grads.beta.index_add_(0, given.column_mk.flatten(), G_mk.flatten().to(grads.beta.dtype))


def _chunks(x: LossInputs, column_mk: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their negatives' vectors [rows, k, D])."""
    k, D = column_mk.shape[1], x.W.shape[1]
    height = max(1, _CHUNK_ELEMENTS // max(1, k * D))
    for start in range(0, column_mk.shape[0] if k else 0, height):
        rows = slice(start, start + height)
        yield rows, x.W.detach()[column_mk[rows]].to(x.acc)


def _is_known_positive(x: LossInputs, facts: Facts, column_mk: Tensor, group: Group | None) -> Tensor:
    """Return whether the document of each listed column is a known positive of its query."""
    # without ids a column is its own document; columns of other ranks cannot be among the given ones
    own_n = torch.arange(x.W.shape[0], device=x.positive.device) + (facts.rank << 40)
    docs_n = own_n if x.doc_ids is None else x.doc_ids
    listed_mk = docs_n[column_mk] if x.W.shape[0] else column_mk
    positive_m = docs_n[x.positive]
    if x.query_ids is None:
        return (listed_mk == positive_m[:, None]) & (x.weight > 0)[:, None]
    longest = max(facts.num_queries), max(facts.num_known)
    return is_known_positive(x.query_ids, listed_mk, positive_m, x.weight, x.known, longest, group)


def is_known_positive(
    query_ids: Tensor,
    listed_mk: Tensor,
    positive_m: Tensor,
    weight_m: Tensor,
    known: Tensor | None,
    longest: tuple[int, int],
    group: Group | None,
) -> Tensor:
    """Return bool [m, k]: whether (query id, document id listed) is a known positive of any rank.

    `longest` are the largest numbers of queries and of known pairs of a rank.
    """
    used = (weight_m > 0).to(torch.int64)
    rows = torch.stack([query_ids, positive_m, used], 1)
    pairs = distributed.all_gather_padded(rows, longest[0], group).wait()
    pairs = pairs[pairs[:, 2] == 1, :2]
    if known is not None:
        marked = torch.cat([known, torch.ones_like(known[:, :1])], 1)  # padding has 0 there
        gathered = distributed.all_gather_padded(marked, longest[1], group).wait()
        pairs = torch.cat([pairs, gathered[gathered[:, 2] == 1, :2]])
    wanted = torch.stack([query_ids[:, None].expand_as(listed_mk), listed_mk], -1).flatten(0, 1)
    numbers = torch.unique(torch.cat([pairs, wanted]), dim=0, return_inverse=True)[1]
    return torch.isin(numbers[pairs.shape[0] :], numbers[: pairs.shape[0]]).view_as(listed_mk)
