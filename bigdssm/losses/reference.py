"""The losses by their dense definition: the whole score matrix on one rank, in float64, gradients by autograd.

The tests compare it with `contrastive_loss` at any number of ranks, tiles and chunks. Shape legend: m queries, n
columns, k candidates, p known positives, L negatives of a query.
"""

import torch
from torch import Tensor

from bigdssm.config import LossConfig
from bigdssm.losses.declarations import FPS, ListDistillation, ListwiseKL, MarginMSE, PairCE, Softmax, Triplet
from bigdssm.losses.inputs import LossBatch


def dense_loss(loss: LossConfig | ListDistillation, batch: LossBatch, columns: str = "all") -> Tensor:
    """Compute the weighted mean of a loss over the queries; arguments as in `contrastive_loss`.

    columns: negatives common to all queries: "all" columns, "in_batch" (the queries' positives) or "none".
    """
    m, n = len(batch.U), len(batch.W)
    positive = torch.arange(m) if batch.positive is None else batch.positive
    weight = torch.ones(m).double() if batch.weight is None else batch.weight.double()
    queries = torch.arange(m) if batch.query_ids is None else batch.query_ids
    docs = torch.arange(n) if batch.doc_ids is None else batch.doc_ids

    scores = batch.alpha * (batch.U.double() @ batch.W.double().T)  # [m, n]
    if batch.beta is not None:
        scores = scores + batch.beta.double()

    # known positives: the own one, known pairs of weight > 0 of any query with the same id, and the explicit ones
    is_known = torch.ones(m, dtype=torch.bool) if batch.is_known is None else batch.is_known
    pairs = torch.stack([queries, docs[positive]], 1)[(weight > 0) & is_known]
    pairs = pairs if batch.known is None else torch.cat([pairs, batch.known])
    same_query, same_doc = queries[:, None] == pairs[:, 0], docs[:, None] == pairs[:, 1]  # [m, p], [n, p]
    known = (same_query.double() @ same_doc.double().T) > 0  # [m, n]
    known |= (weight > 0)[:, None] & (docs == docs[positive][:, None])
    if batch.time is not None and batch.since is not None:
        known |= batch.since > batch.time[:, None]

    # a query's negatives: columns common to all queries, then its candidates, except known positives
    column = {"all": torch.arange(n), "in_batch": positive, "none": positive[:0]}[columns].expand(m, -1)
    column = column if batch.negatives is None else torch.cat([column, batch.negatives], 1)  # [m, L]
    index = column.clamp(min=0)
    negative = (
        scores.gather(1, index) if batch.neg_bias is None else scores.gather(1, index) + batch.neg_bias.double()[index]
    )
    own = scores.gather(1, positive[:, None])  # [m, 1]
    if batch.score_bias is not None:
        own = own + batch.score_bias[:, :1]
        negative = negative + batch.score_bias[:, 1:]
    used = (column >= 0) & (index != positive[:, None]) & ~known.gather(1, index) & (negative > -torch.inf)

    value = _value(loss, own, negative.masked_fill(~used, 0.0), used, batch.teacher)
    # the softmax over the queries in the positive's column, or the mean of both
    if isinstance(loss, FPS) and loss.direction != "q2d":
        others = scores.masked_fill(known, -torch.inf).T[positive]  # [m, m]
        over_queries = torch.cat([own, others], 1).logsumexp(1) - own[:, 0]
        value = over_queries if loss.direction == "d2q" else (value + over_queries) / 2
    return (weight * value).sum() / weight.sum().clamp(min=1e-300)


def _value(
    loss: LossConfig | ListDistillation, own: Tensor, negative: Tensor, used: Tensor, teacher: Tensor | None
) -> Tensor:
    """Return the loss [m] of the positives' scores [m, 1] and the negatives' [m, L], 0 where not `used`."""

    def softplus(x: Tensor) -> Tensor:
        return torch.logaddexp(x, torch.zeros_like(x))

    def mean(x: Tensor) -> Tensor:
        return (x * used).sum(1) / used.sum(1).clamp(min=1)

    if isinstance(loss, ListwiseKL | MarginMSE):  # a candidate counts where both it and the positive have a score
        assert teacher is not None
        used = used & (scored := teacher.isfinite())[:, :1] & scored[:, 1:]
        own_t, negative_t = (teacher.double() / loss.temperature).masked_fill(~scored, 0.0).tensor_split([1], 1)
    unused = torch.nn.functional.pad(~used, (1, 0))
    match loss:
        case FPS() | Softmax():
            return torch.cat([own, negative], 1).masked_fill(unused, -torch.inf).logsumexp(1) - own[:, 0]
        case PairCE():
            return mean(softplus(negative - own))
        case Triplet(margin=margin):
            return mean((margin + negative - own).clamp(min=0))
        case ListwiseKL():
            log_q = torch.cat([own, negative], 1).masked_fill(unused, -torch.inf).log_softmax(1)
            log_p = torch.cat([own_t, negative_t], 1).masked_fill(unused, -torch.inf).log_softmax(1)
            return (log_p.exp() * (log_p - log_q).masked_fill(unused, 0.0)).sum(1)
        case MarginMSE():
            return mean(((own - negative) - (own_t - negative_t)).square())
    raise ValueError(f"{loss} has no dense definition here")
