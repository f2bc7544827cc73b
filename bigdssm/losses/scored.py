"""The fine-tuning losses of given negatives on scores made by any scorer, an MLP say; gradients by autograd.

Terms, masks, weights and the scale of loss and gradients are those of `ranking_loss` with given negatives.

Shape legend: m queries and k given negatives of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.extras import global_mean
from bigdssm.losses.given import is_known_positive
from bigdssm.losses.inputs import LossInputError
from bigdssm.losses.output import LocalStats, LossOutput, reduce_output, weighted
from bigdssm.losses.pairwise import Pairwise
from bigdssm.losses.ranking import RANKING_NAMES, RankingName
from bigdssm.losses.tiles import softplus


def scored_loss(
    name: RankingName,
    scores: Tensor,
    *,
    weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    known: Tensor | None = None,
    margin: float = 0.2,
    group: Group | None = None,
) -> LossOutput:
    """Return a fine-tuning loss of the scores [m, 1 + k]; a collective.

    Column 0 holds the positives, the others negatives, −inf where there is none. weight [m] ≥ 0. query_ids [m] and
    doc_ids [m, 1 + k], both or neither: negatives that are known positives of their query, on any rank, are dropped.
    known int64 [p, 2]: (query id, document id) of further ones. margin: of triplet.
    Raises: LossInputError (PeerError on the ranks whose own input is good), on every rank.
    """
    error = _first_error(name, scores, weight, query_ids, doc_ids, known)
    sizes = [0.0] * 5
    if error is None:
        scores = scores if scores.dtype == torch.float64 else scores.float()  # terms and sums, not in bfloat16
        weight = torch.ones_like(scores[:, 0]) if weight is None else weight.detach().to(scores.dtype)
        num_known = -1 if known is None else known.shape[0]
        sizes = [1.0, RANKING_NAMES.index(name) + 8.0 * (query_ids is not None), scores.shape[0], num_known]
        sizes.append(float(weight.sum()))
    table = distributed.all_gather_padded(torch.tensor([sizes], dtype=torch.float64, device=scores.device), 1, group)
    ok, modes, rows, numbers_known, weights = table.wait().T.tolist()
    if min(ok) == 0:
        distributed.raise_together(error, group)
    if len(set(modes)) > 1 or len({number < 0 for number in numbers_known}) > 1:
        raise LossInputError("the ranks disagree on the loss, or on which of query_ids, doc_ids, known are given")
    assert weight is not None
    if query_ids is not None and doc_ids is not None:
        longest = int(max(rows)), int(max(numbers_known))
        pairs = query_ids, doc_ids[:, 1:], doc_ids[:, 0]
        drop = is_known_positive(*pairs, weight.detach(), known, longest, group)
    else:
        drop = torch.zeros_like(scores[:, 1:], dtype=torch.bool)
    used = ~drop & (scores[:, 1:].detach() > -torch.inf)
    terms = _terms(Pairwise(name, margin), scores[:, 0], scores[:, 1:].masked_fill(~used, -torch.inf), used)
    terms = weighted(weight, terms)
    local = _stats(scores.detach(), used, drop, weight)
    return LossOutput(
        global_mean(terms.sum(), float(weight.sum()), group), reduce_output(local, sum(weights), group)[1]
    )


def _first_error(
    name: str,
    scores: Tensor,
    weight: Tensor | None,
    query_ids: Tensor | None,
    doc_ids: Tensor | None,
    known: Tensor | None,
) -> LossInputError | None:
    """Return what is wrong with this rank's input, if anything."""
    if name not in RANKING_NAMES:
        return LossInputError(f"the loss must be one of {', '.join(RANKING_NAMES)}, got {name!r}")
    if scores.ndim != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        return LossInputError(f"scores must be floating point [m, 1 + k], got {scores.dtype} {list(scores.shape)}")
    m = scores.shape[0]
    if weight is not None and (list(weight.shape) != [m] or not bool((weight >= 0).all() & weight.isfinite().all())):
        return LossInputError(f"weight must be [{m}], finite and not negative, got {list(weight.shape)}")
    if (query_ids is None) != (doc_ids is None) or (known is not None and query_ids is None):
        return LossInputError("query_ids and doc_ids go together, and known needs both")
    for what, ids, shape in (("query_ids", query_ids, [m]), ("doc_ids", doc_ids, list(scores.shape))):
        if ids is not None and (ids.dtype != torch.int64 or list(ids.shape) != shape):
            return LossInputError(f"{what} must be int64 {shape}, got {ids.dtype} {list(ids.shape)}")
    if known is not None and (known.dtype != torch.int64 or known.ndim != 2 or known.shape[1] != 2):
        return LossInputError(f"known must be int64 [pairs, 2], got {known.dtype} {list(known.shape)}")
    return None


def _terms(loss: Pairwise, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor) -> Tensor:
    """Return each query's term [m]."""
    if loss.name == "softmax":
        return torch.logsumexp(torch.cat([positive_m[:, None], negative_mk], 1), 1) - positive_m
    # what is not used is filled before and after: no −inf reaches a gradient
    filled_mk = negative_mk.masked_fill(~used_mk, 0.0)
    above_mk = filled_mk - positive_m[:, None] if loss.relative else filled_mk
    values_mk = (above_mk + loss.margin).clamp(min=0) if loss.name == "triplet" else softplus(above_mk)
    sum_m = values_mk.masked_fill(~used_mk, 0.0).sum(1)
    return sum_m / used_mk.sum(1).clamp(min=1) if loss.relative else sum_m + softplus(-positive_m)


def _stats(scores: Tensor, used: Tensor, drop: Tensor, weight: Tensor) -> LocalStats:
    largest_m = scores[:, 1:].masked_fill(~used, -torch.inf).amax(1)
    judged = weight > 0
    return LocalStats(
        loss_sum=scores.new_zeros(()),
        correct=((scores[:, 0] > largest_m) & judged).sum(),
        judged=judged.sum(),
        dropped=float((drop & (scores[:, 1:] > -torch.inf)).sum()),
        entries=float((scores[:, 1:] > -torch.inf).sum()),
        queries=float(scores.shape[0]),
        lse=torch.maximum(scores[:, 0], largest_m)[judged],
    )
