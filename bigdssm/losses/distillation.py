"""Distillation from a teacher's scores of all documents of the global batch; that of candidates is a term."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import LossInputError, exchange, require
from bigdssm.losses.terms import attach

STRIP_CELLS = 1 << 22  # scores computed at a time


@dataclass(frozen=True)
class BatchTeacher:
    """Teacher vectors of a batch; their inner products are the teacher scores."""

    queries: Tensor  # [m, E]
    documents: Tensor  # [n, E]
    temperature: float = 1.0  # divides the scores


def batch_kl(
    U: Tensor, W: Tensor, teacher: BatchTeacher, *, alpha: Tensor, beta: Tensor | None = None,
    weight: Tensor | None = None, counts: Tensor | None = None, group: Group | None = None,
) -> Tensor:  # fmt: skip
    """Compute the mean KL divergence over the queries of all ranks; a collective.

    U [m, D], W [n, D], alpha a scalar, beta [n] as in `contrastive_loss`; weight [m] ≥ 0 of the queries; counts [n]:
    number of documents merged into a column, by default 1. The value is the same on every rank and does not depend on
    the distribution of columns over ranks; the mean of the gradients over ranks is the global gradient.
    Raises: LossInputError (PeerError on ranks with valid input), on every rank.
    """
    error, acc = None, torch.float64 if U.dtype == torch.float64 else torch.float32
    try:
        for name, vectors, rows in (("queries", teacher.queries, U), ("documents", teacher.documents, W)):
            is_valid = vectors.is_floating_point() and vectors.dim() == 2 and len(vectors) == len(rows)
            shape = list(vectors.shape)
            require(is_valid, f"the teacher's {name} must be floating point [{len(rows)}, E], got {shape}")
        is_valid = teacher.queries.shape[1] == teacher.documents.shape[1]
        require(is_valid, "the teacher's two sides must be of one width")
        finite = torch.stack([x.isfinite().all() for x in (U, W, teacher.queries, teacher.documents)]).all()
    except LossInputError as caught:
        error, finite = caught, torch.ones((), dtype=torch.bool, device=U.device)
    weight = torch.ones(len(U), dtype=acc, device=U.device) if weight is None else weight.detach().to(acc)
    counts = torch.ones(len(W), dtype=acc, device=W.device) if counts is None else counts.to(acc)
    bias = torch.zeros(len(W), dtype=acc, device=W.device) if beta is None else beta.detach().to(acc)
    table, _ = exchange(
        error, {"the teacher": f"{teacher.temperature}, beta {beta is not None}"},
        {"columns": float(len(W)), "weight_sum": weight.sum(), "bad_vectors": (~finite).sum()},
        lambda x: "vectors, or the teacher's, hold NaN or inf" if x["bad_vectors"] else None, U.device, group,
    )  # fmt: skip
    longest, total = max(int(row["columns"]) for row in table), sum(row["weight_sum"] for row in table)
    sent = [W.detach().to(acc), teacher.documents.to(acc), bias, counts]
    W_ND, teacher_NE, bias_N, counts_N = distributed.all_gather_packed(sent, longest, group).wait()
    log_N = counts_N.log()  # −inf for padding, whose count is 0
    scale = alpha.detach().to(acc)
    value, grad_W, grad_bias = weight.new_zeros(()), torch.zeros_like(W_ND), torch.zeros_like(bias_N)
    grad_U, grad_alpha = torch.zeros_like(U, dtype=acc), weight.new_zeros(())
    height = max(1, STRIP_CELLS // max(1, len(W_ND)))
    for first in range(0, len(U), height):
        strip = slice(first, first + height)
        U_sD, weight_s = U[strip].detach().to(acc), weight[strip]
        product_sN = U_sD @ W_ND.T
        log_q = (scale * product_sN + (bias_N + log_N)).log_softmax(1)
        log_p = (teacher.queries[strip].to(acc) @ teacher_NE.T / teacher.temperature + log_N).log_softmax(1)
        p, gap = log_p.exp(), (log_p - log_q).masked_fill(log_N == -torch.inf, 0.0)
        value += (weight_s * (p * gap).sum(1)).sum()
        grad_sN = weight_s[:, None] * (log_q.exp() - p)  # of the scores
        grad_alpha += (grad_sN * product_sN).sum()
        grad_bias += grad_sN.sum(0)
        grad_sN *= scale
        grad_U[strip] = grad_sN @ W_ND
        grad_W += grad_sN.T @ U_sD
    value = distributed.all_reduce(value.double(), "sum", group)
    mean, factor = (1 / total, distributed.world_size(group) / total) if total else (0.0, 0.0)
    of_columns = distributed.reduce_scatter_rows(torch.cat([grad_W, grad_bias[:, None]], 1), group)[: len(W)] * factor
    gradients = (grad_U * factor, of_columns[:, :-1], grad_alpha * factor, of_columns[:, -1])
    return attach((value * mean).to(acc), (U, W, alpha, beta), gradients)
