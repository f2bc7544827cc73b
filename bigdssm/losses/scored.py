"""Losses on the scores of a scorer, such as an MLP; gradients by autograd.

Masks, weights and the scale of loss and gradients are those of `contrastive_loss` with candidates.

Shape legend: m queries of this rank and k candidates per query.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bigdssm.config import LossConfig
from bigdssm.distributed import Group
from bigdssm.losses.contrastive import LossOutput, build_term, check_teacher, global_mean, reduce_output
from bigdssm.losses.declarations import ListDistillation
from bigdssm.losses.inputs import LossInputError, Number, exchange, require, weighted
from bigdssm.losses.masks import count_known_positives, find_known_positives, gather_pairs, local_pairs
from bigdssm.losses.terms import Term


def scored_loss(
    loss: LossConfig | ListDistillation,
    scores: Tensor,
    *,
    weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    known: Tensor | None = None,
    is_known: Tensor | None = None,
    teacher: Tensor | None = None,
    group: Group | None = None,
) -> LossOutput:
    """Compute a loss on the scores [m, 1 + k]; a collective.

    Column 0 holds the positives, the others negatives, −inf if absent. weight [m] ≥ 0. query_ids [m] and doc_ids
    [m, 1 + k], both or neither: negatives that are known positives of their query, on any rank, are dropped. known
    int64 [p, 2]: additional known positives (query id, document id). is_known bool [m]: as of `LossBatch`. teacher
    [m, 1 + k]: a teacher's scores, for a distillation. Raises: LossInputError (PeerError on ranks with valid input), on
    every rank.
    """
    term, error = None, None
    numbers: dict[str, Number] = dict.fromkeys(("known", "weight_sum", "bad_weight", "queries"), 0.0)
    try:
        term = build_term(loss)
        direction = getattr(loss, "direction", "q2d")
        require(direction == "q2d", f"direction must be one of q2d, got {direction!r}")
        _check(term, scores, weight, query_ids, doc_ids, known, teacher)
        scores = scores if scores.dtype == torch.float64 else scores.float()  # terms and sums, not in bfloat16
        weight = torch.ones_like(scores[:, 0]) if weight is None else weight.detach().to(scores.dtype)
        bad = (~((weight >= 0) & weight.isfinite())).sum()
        known_weight = weight if is_known is None else weight * is_known
        values = count_known_positives(query_ids, known_weight, known), weight.sum(), bad, scores.shape[0]
        numbers = dict(zip(numbers, values, strict=True))
    except LossInputError as caught:
        error = caught
    optional = {"query_ids": query_ids, "doc_ids": doc_ids, "known": known, "is_known": is_known}
    words = ", ".join([str(term), *(name for name, value in optional.items() if value is not None)])
    agreed = {"the loss, or on which of query_ids, doc_ids, known, is_known are given": words}

    def find_fault(x: Mapping[str, float]) -> str | None:
        return f"weight must be [{int(x['queries'])}], finite and not negative" if x["bad_weight"] else None

    of_ranks, table = exchange(error, agreed, numbers, find_fault, scores.device, group)
    assert term is not None and weight is not None
    drop = torch.zeros_like(scores[:, 1:], dtype=torch.bool)
    if query_ids is not None and doc_ids is not None:
        pairs = local_pairs(query_ids, doc_ids[:, 0], known_weight, known)
        all_pairs = gather_pairs(pairs, [int(row["known"]) for row in of_ranks], group)
        positives = find_known_positives(
            query_ids, doc_ids[:, 0], weight, known, all_pairs, table[:, 0].long(), all_known=is_known is None
        )
        drop = positives.contain(doc_ids[:, 1:])
    positive_m, negative_mk = scores[:, 0], scores[:, 1:]
    present = negative_mk.detach() > -torch.inf
    used = present & ~drop
    values_m = term.on_scores(positive_m, negative_mk.masked_fill(~used, -torch.inf), used, teacher)
    values_m = weighted(weight, values_m)
    largest_m = negative_mk.detach().masked_fill(~used, -torch.inf).amax(1)
    best_m = torch.maximum(positive_m.detach(), largest_m)
    stats = reduce_output(
        scores.new_zeros(()), weight, positive_m.detach(), largest_m, best_m, present.sum(), (drop & present).sum(),
        sum(row["weight_sum"] for row in of_ranks), group,
    )[1]  # fmt: skip
    return LossOutput(global_mean(values_m.sum(), weight.sum(), group), stats)


def _check(
    term: Term,
    scores: Tensor,
    weight: Tensor | None,
    query_ids: Tensor | None,
    doc_ids: Tensor | None,
    known: Tensor | None,
    teacher: Tensor | None,
) -> None:
    """Raise LossInputError if this rank's input is invalid."""
    is_valid = scores.ndim == 2 and scores.shape[1] >= 2 and scores.is_floating_point()
    require(is_valid, f"scores must be floating point [m, 1 + k], got {scores.dtype} {list(scores.shape)}")
    m = scores.shape[0]
    if weight is not None:
        require(list(weight.shape) == [m], f"weight must be [{m}], got {list(weight.shape)}")
    is_valid = (query_ids is None) == (doc_ids is None) and (known is None or query_ids is not None)
    require(is_valid, "query_ids and doc_ids go together, and known needs both")
    for name, ids, shape in (("query_ids", query_ids, [m]), ("doc_ids", doc_ids, list(scores.shape))):
        is_valid = ids is None or (ids.dtype == torch.int64 and list(ids.shape) == shape)
        require(is_valid, f"{name} must be int64 {shape}, got {_kind(ids)}")
    is_valid = known is None or (known.dtype == torch.int64 and known.ndim == 2 and known.shape[1] == 2)
    require(is_valid, f"known must be int64 [pairs, 2], got {_kind(known)}")
    check_teacher(term, teacher, m, scores.shape[1] - 1)


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
