"""Losses on the scores of a scorer, such as an MLP.

Masks, weights and the scale of loss and gradients are those of `contrastive_loss` with candidates.

Shape legend: m queries of this rank and k candidates per query.
"""

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import LossConfig
from bigdssm.distributed import Group
from bigdssm.losses.contrastive import LossOutput, check_teacher, describe_loss, reduce_output
from bigdssm.losses.declarations import ListDistillation
from bigdssm.losses.inputs import LossInputError, Number, exchange, require
from bigdssm.losses.masks import count_known_positives, find_known_positives, gather_pairs, local_pairs
from bigdssm.losses.terms import Scores, attach


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
    named, error = "", None
    numbers: dict[str, Number] = dict.fromkeys(("known", "weight_sum", "bad_weight", "queries"), 0.0)
    try:
        named = describe_loss(loss)
        direction = getattr(loss, "direction", "q2d")
        require(direction == "q2d", f"direction must be one of q2d, got {direction!r}")
        is_valid = scores.ndim == 2 and scores.shape[1] >= 2 and scores.is_floating_point()
        require(is_valid, f"scores must be floating point [m, 1 + k], got {scores.dtype} {list(scores.shape)}")
        m, length = scores.shape
        is_valid = weight is None or list(weight.shape) == [m]
        require(is_valid, f"weight must be [{m}], got {[] if weight is None else list(weight.shape)}")
        is_valid = (query_ids is None) == (doc_ids is None) and (known is None or query_ids is not None)
        require(is_valid, "query_ids and doc_ids go together, and known needs both")
        for name, ids, shape in (("query_ids", query_ids, [m]), ("doc_ids", doc_ids, [m, length])):
            is_valid = ids is None or (ids.dtype == torch.int64 and list(ids.shape) == shape)
            require(is_valid, f"{name} must be int64 {shape}, got {_kind(ids)}")
        is_valid = known is None or (known.dtype == torch.int64 and known.ndim == 2 and known.shape[1] == 2)
        require(is_valid, f"known must be int64 [pairs, 2], got {_kind(known)}")
        check_teacher(loss, named, teacher, m, length - 1)
        score_ml = scores.detach().double()
        weight = torch.ones_like(score_ml[:, 0]) if weight is None else weight.detach().double()
        bad = (~((weight >= 0) & weight.isfinite())).sum()
        known_weight = weight if is_known is None else weight * is_known
        num_known = count_known_positives(query_ids, known_weight, known)
        numbers = {"known": num_known, "weight_sum": weight.sum(), "bad_weight": bad, "queries": m}
    except LossInputError as caught:
        error = caught
    optional = {"query_ids": query_ids, "doc_ids": doc_ids, "known": known, "is_known": is_known}
    words = ", ".join([named, *(name for name, value in optional.items() if value is not None)])
    agreed = {"the loss, or on which of query_ids, doc_ids, known, is_known are given": words}
    of_ranks, table = exchange(
        error, agreed, numbers,
        lambda x: f"weight must be [{int(x['queries'])}], finite and not negative" if x["bad_weight"] else None,
        scores.device, group,
    )  # fmt: skip
    assert weight is not None
    positive_m, negative_mk = score_ml[:, 0], score_ml[:, 1:]
    present_mk = negative_mk > -torch.inf
    used_mk = present_mk
    if query_ids is not None and doc_ids is not None:
        pairs = local_pairs(query_ids, doc_ids[:, 0], known_weight, known)
        all_pairs = gather_pairs(pairs, [int(row["known"]) for row in of_ranks], group)
        positives = find_known_positives(
            query_ids, doc_ids[:, 0], weight, known, all_pairs, table[:, 0].long(), all_known=is_known is None
        )
        used_mk = present_mk & ~positives.contain(doc_ids[:, 1:])
    negative_mk = negative_mk.masked_fill(~used_mk, -torch.inf)
    with torch.no_grad():
        result = loss.value_and_gradients(Scores(weight, positive_m, negative_mk, used_mk, teacher_ml=teacher))
    weight_sum, largest_m = sum(row["weight_sum"] for row in of_ranks), negative_mk.amax(1)
    mean, stats = reduce_output(
        result.value_m.sum(), weight, positive_m, largest_m, torch.maximum(positive_m, largest_m),
        present_mk.sum(), (present_mk & ~used_mk).sum(), weight_sum, group,
    )  # fmt: skip
    mean = mean.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return LossOutput(mean, stats)
    factor = distributed.world_size(group) / weight_sum if weight_sum > 0 else 0.0
    grad_ml = torch.cat([result.positive_grad_m[:, None], result.candidate_grad_mk], 1) * factor
    return LossOutput(attach(mean, (scores,), (grad_ml,)), stats)


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
