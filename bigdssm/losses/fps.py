"""The Full Product Softmax loss: every query against every document of the global batch, on any number of ranks.

    out = fps_loss(U, W, positive, alpha=alpha, query_ids=query_ids, doc_ids=doc_ids)
    out.loss.backward()

It is called on every rank at once, with or without a process group. U and W may be leaves (gradient cache): U.grad,
W.grad, alpha.grad and beta.grad then hold world_size times this rank's share, so that the mean over ranks of what is
back-propagated from them is the gradient of the global loss. No other factor belongs anywhere.

Only W is gathered, gradients are computed with the loss, and the score matrix exists one tile at a time.

Shape legend: m queries and n columns of this rank, N slots of all ranks, D vector size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.columns import Columns, gather_columns
from bigdssm.losses.inputs import Facts, LossInputError, LossInputs, check_inputs, exchange
from bigdssm.losses.masks import DropPlan, plan_drops
from bigdssm.losses.output import (
    LossOutput,
    attach,
    finish_gradients,
    local_stats,
    reduce_output,
    reduce_sums,
    weighted,
)
from bigdssm.losses.softmax import Coefficients, column_pass, gradient_pass, softmax_rows
from bigdssm.losses.tiles import TILE_WIDTH, Problem, Sums, add_biases, positive_scores, product_precision, softplus

Direction = Literal["q2d", "d2q", "both"]
DIRECTIONS = ("q2d", "d2q", "both")


def fps_loss(
    U: Tensor,
    W: Tensor,
    positive: Tensor | None = None,
    *,
    alpha: Tensor | float,
    beta: Tensor | None = None,
    neg_bias: Tensor | None = None,
    weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    known: Tensor | None = None,
    direction: Direction = "q2d",
    tile: int | None = None,
    group: Group | None = None,
) -> LossOutput:
    """Return the softmax loss over all documents of all ranks; a collective.

    U [m, D] queries and W [n, D] documents, float64, float32 or bfloat16; m and n may differ between ranks and be 0.
    positive int64 [m]: the column of each query's document, arange(m) by default; columns may be shared. alpha: one
    float, multiplies the products. beta [n]: added to a document's scores. neg_bias [n]: added where the document is a
    negative, query → doc only; no gradient; −inf: never a negative. weight [m] ≥ 0. query_ids [m], doc_ids [n] int64:
    what the masks compare; without them each query, each column is its own. known int64 [p, 2]: (query id, doc id) of
    further positives to drop. tile: columns per tile.

    The loss is the same on every rank; products are float32 (float64 for float64 input), sums
    of exponentials float64.
    Raises: LossInputError (PeerError on the ranks whose own input is good), on every rank.
    Source: Yi et al. 2019 (in-batch softmax); the two-direction form is that of Radford et al. 2021, eq. in figure 3.
    """
    checked: LossInputs | LossInputError
    try:
        checked = check_inputs(
            U, W, positive, alpha=alpha, beta=beta, neg_bias=neg_bias, weight=weight,
            query_ids=query_ids, doc_ids=doc_ids, known=known,
        )  # fmt: skip
        if direction not in DIRECTIONS:
            raise LossInputError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if tile is not None and tile < 1:
            raise LossInputError(f"tile must be at least 1, got {tile}")
    except LossInputError as error:
        checked = error
    mode = DIRECTIONS.index(direction) if direction in DIRECTIONS else -1
    x, facts = exchange(checked, mode, getattr(U, "device", torch.device("cpu")), group)
    with torch.no_grad(), product_precision(x):
        columns = gather_columns(x, facts, tile or TILE_WIDTH, group)
        drops = plan_drops(x, columns)
        if direction == "q2d":
            return _query_to_doc(x, facts, columns, drops, group)
        return _with_columns(x, facts, columns, drops, direction == "both", group)


def _query_to_doc(x: LossInputs, facts: Facts, columns: Columns, drops: DropPlan, group: Group | None) -> LossOutput:
    bias_N = add_biases(columns.beta, columns.neg_bias)
    p = Problem(
        x.U.detach().to(x.acc), columns, drops, float(x.alpha.detach()), None if bias_N is None else bias_N.to(x.acc)
    )
    positive_m = positive_scores(x)
    sums = Sums.like(x, facts, columns) if facts.wants else None
    rows = softmax_rows(p, positive_m, x.weight, None, sums)
    used = x.weight > 0
    terms_m = softplus(rows.log_sum - positive_m)
    lse_m = torch.logaddexp(rows.log_sum, positive_m)
    local = local_stats(x, columns, drops, weighted(x.weight, terms_m), positive_m, rows.largest, lse_m[used])
    loss, stats = reduce_output(local, facts.weight_sum, group)
    if sums is None:
        return LossOutput(attach(loss, x, None), stats)
    pull_m = weighted(x.weight, torch.sigmoid(rows.log_sum - positive_m))
    grads = finish_gradients(x, facts, reduce_sums(sums, x.W.shape[0], group), pull_m, pull_m)
    return LossOutput(attach(loss, x, grads), stats)


def _with_columns(
    x: LossInputs, facts: Facts, columns: Columns, drops: DropPlan, both: bool, group: Group | None
) -> LossOutput:
    # beta is constant in a column and cancels there: without the rows it is left out
    beta_N = columns.beta if both else None
    neg_bias_N = columns.neg_bias if both else None
    p = Problem(
        x.U.detach().to(x.acc), columns, drops, float(x.alpha.detach()), None if beta_N is None else beta_N.to(x.acc)
    )
    positive_m = positive_scores(x, with_beta=both)
    rows, log_N, shift = column_pass(p, facts, neg_bias_N, both, group)
    column_log_m = log_N[x.positive + columns.own_start]
    row_share, column_share = (0.5, 0.5) if both else (0.0, 1.0)
    used = x.weight > 0
    terms_m = column_share * softplus(column_log_m - positive_m)
    lse = [torch.logaddexp(column_log_m, positive_m)[used]]
    if both:
        terms_m = terms_m + row_share * softplus(rows.log_sum - positive_m)
        lse.append(torch.logaddexp(rows.log_sum, positive_m)[used])
    local = local_stats(x, columns, drops, weighted(x.weight, terms_m), positive_m, rows.largest, torch.cat(lse))
    loss, stats = reduce_output(local, facts.weight_sum, group)
    if not facts.wants:
        return LossOutput(attach(loss, x, None), stats)
    row_pull_m = weighted(x.weight, row_share * torch.sigmoid(rows.log_sum - positive_m))
    column_pull_m = weighted(x.weight, column_share * torch.sigmoid(column_log_m - positive_m))
    sums = Sums.like(x, facts, columns)
    coefficients = Coefficients(
        row_weight_m=row_share * x.weight,
        row_lse_m=torch.logaddexp(rows.log_sum, positive_m),
        neg_bias_N=neg_bias_N,
        column_weight_N=_sum_over_pairs(x, facts, columns, column_pull_m, group),
        column_log_sum_N=log_N,
    )
    gradient_pass(p, shift, coefficients, sums)
    reduced = reduce_sums(sums, x.W.shape[0], group)
    grads = finish_gradients(x, facts, reduced, row_pull_m + column_pull_m, row_pull_m)
    return LossOutput(attach(loss, x, grads), stats)


def _sum_over_pairs(x: LossInputs, facts: Facts, columns: Columns, values_m: Tensor, group: Group | None) -> Tensor:
    """Sum a value per pair into its column, and gather: [N]."""
    own_n = torch.zeros(x.W.shape[0], dtype=values_m.dtype, device=values_m.device).index_add_(0, x.positive, values_m)
    return distributed.all_gather_padded(own_n, facts.longest, group).wait()
