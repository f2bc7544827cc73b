"""What goes beside the losses: weights from relevance, a norm regulariser, and losses on scores made elsewhere.

Shape legend: m queries and k given negatives of this rank, D vector size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import LossInputError
from bigdssm.losses.pairwise import Pairwise
from bigdssm.losses.ranking import RANKING_NAMES, RankingName
from bigdssm.losses.tiles import softplus


def relevance_weight(relevance: Tensor, kind: Literal["indicator", "relevance"]) -> Tensor:
    """Return the weights [m] from relevance: 1[r > 0], or r. Raises: LossInputError where r is negative or NaN."""
    if not bool(relevance.isfinite().all()) or bool((relevance < 0).any()):
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
    return _reduced((squares * weight).sum(), float(weight.sum()), group)


def scored_loss(
    name: RankingName,
    positive_scores: Tensor,
    negative_scores: Tensor,
    *,
    weight: Tensor | None = None,
    margin: float = 0.2,
    group: Group | None = None,
) -> Tensor:
    """Return a fine-tuning loss of given negatives on scores from any scorer (an MLP, say); a collective.

    positive_scores [m]; negative_scores [m, k], −inf where there is none. The same terms as `ranking_loss`, here by
    autograd; the same value on every rank and the same scale of gradients.
    """
    if name not in RANKING_NAMES:
        raise LossInputError(f"the loss must be one of {', '.join(RANKING_NAMES)}, got {name!r}")
    m = positive_scores.shape[0]
    if list(negative_scores.shape[:1]) != [m] or negative_scores.ndim != 2:
        raise LossInputError(f"negative_scores must be [{m}, k], got {list(negative_scores.shape)}")
    weight = torch.ones_like(positive_scores) if weight is None else weight.to(positive_scores.dtype)
    above = negative_scores - (0 if name == "sigmoid" else positive_scores[:, None])
    used = negative_scores > -torch.inf
    if name == "softmax":
        everything = torch.cat([positive_scores[:, None], negative_scores], 1)
        terms = torch.logsumexp(everything, 1) - positive_scores
    else:
        values = (above + margin).clamp(min=0) if name == "triplet" else softplus(above.masked_fill(~used, -1e9))
        summed = values.masked_fill(~used, 0).sum(1)
        mean = summed / used.sum(1).clamp(min=1)
        terms = mean if Pairwise(name).relative else summed + softplus(-positive_scores)
    return _reduced((weight * terms).sum(), float(weight.sum()), group)


def _reduced(own: Tensor, own_total: float, group: Group | None) -> Tensor:
    """Return Σ own / Σ own_total over all ranks, with gradients world_size times this rank's share."""
    sums = torch.stack([own.detach().double(), own.new_tensor(own_total, dtype=torch.float64)])
    distributed.all_reduce(sums, "sum", group)
    if sums[1] == 0:
        return own * 0
    share = own * (distributed.world_size(group) / float(sums[1]))
    return share + ((sums[0] / sums[1]).to(own.dtype) - share.detach())
