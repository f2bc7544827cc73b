"""One engine for every loss on vectors, on any number of ranks.

    out = contrastive_loss(PairCE(), U, W, positive, alpha=alpha, negatives=negatives, columns="in_batch")
    out.loss.backward()

It is called on every rank at once, with or without a process group. U and W may be leaves (gradient cache): U.grad,
W.grad, alpha.grad and beta.grad then hold world_size times this rank's share, so that the mean over ranks of what is
back-propagated from them is the gradient of the global loss. No other factor belongs anywhere.

Only W is gathered, gradients are computed with the loss, and the score matrix exists one tile at a time.

Shape legend: m queries, n columns and k listed negatives of this rank, N columns of all ranks, D vector size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.distillation import check_teacher
from bigdssm.losses.exchange import LossInputError, need
from bigdssm.losses.ids import occurrences
from bigdssm.losses.inputs import GlobalSizes, LossInputs, check_inputs, global_sizes
from bigdssm.losses.listed import add_listed, score_listed
from bigdssm.losses.masks import find_false_negatives, find_known_positives, gather_pairs, own_pairs
from bigdssm.losses.output import LocalStats, LossOutput, attach, finish_gradients, reduce_output
from bigdssm.losses.passes import Gradients, ScorePasses, gather_columns, product_precision, triton_matrix
from bigdssm.losses.terms import TERMS, Scores, Term

Direction = Literal["q2d", "d2q", "both"]
Shared = Literal["all", "in_batch", "none"]
_SHARED = {"all": "all columns", "in_batch": "in-batch and listed negatives", "none": "listed negatives"}


def contrastive_loss(
    term: Term | str,
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
    negatives: Tensor | None = None,
    teacher: Tensor | None = None,
    columns: Shared = "all",
    direction: Direction = "q2d",
    tile: int | None = None,
    group: Group | None = None,
) -> LossOutput:
    """Return the loss of a term over the documents of all ranks, those listed, or both; a collective.

    U [m, D] queries and W [n, D] documents, float64, float32 or bfloat16; m and n may differ between ranks and be 0.
    positive int64 [m]: the column of each query's document, arange(m) by default; columns may be shared. alpha: one
    float, multiplies the products. beta [n]: added to a document's scores. neg_bias [n]: added where the document is a
    negative, query → doc only; no gradient; −inf: never a negative. weight [m] ≥ 0. query_ids [m], doc_ids [n] int64:
    what the masks compare; without them each query, each column is its own. known int64 [p, 2]: (query id, doc id) of
    further positives to drop; without query_ids (number of the query, doc id), which stay on this rank. tile: columns
    per tile.

    negatives int64 [m, k]: columns of this rank listed for each query (hard negatives), −1 where there is none.
    teacher [m, 1 + k]: a judge's scores of the query's document and of those listed, for a term of `distillation`.
    columns: what is a negative of every query besides: `all` columns of all ranks; `in_batch`, the documents of all
    other queries, which count as often as they occur, so that it makes no difference which rows share a rank, and
    thereby a column; or `none`.

    The loss is the same on every rank; products are float32 (float64 for float64 input), sums of exponentials float64.
    Raises: LossInputError (PeerError on the ranks whose own input is good), on every rank.
    """
    x: LossInputs | LossInputError
    shared, kept = None, None  # what is gathered: the columns that are negatives of every query
    try:
        x = check_inputs(
            U, W, positive, alpha=alpha, beta=beta, neg_bias=neg_bias, weight=weight,
            query_ids=query_ids, doc_ids=doc_ids, known=known,
        )  # fmt: skip
        _check_choice(term, x, negatives, teacher, columns, direction, tile)
        x, shared, kept = _share(x, columns, group)
    except LossInputError as error:
        x = error
    words = f"{term} over {_SHARED.get(columns, columns)}, {direction}"
    if isinstance(shared, LossInputs) and triton_matrix.available(shared):
        words += ", by Triton kernels"
    x, sizes = global_sizes(x, shared, negatives, words, getattr(U, "device", torch.device("cpu")), group)
    assert isinstance(term, Term) and shared is not None
    m, n, device = x.U.shape[0], x.W.shape[0], x.W.device
    if negatives is None:
        negatives = x.positive.new_zeros((m, 0))
    # without ids a column is its own document, of its index among all ranks' as id
    docs_n = torch.arange(n, device=device) + sizes.rank * sizes.longest if x.doc_ids is None else x.doc_ids
    doc_m = docs_n[x.positive]
    with torch.no_grad(), product_precision(x):
        pairs = None if x.query_ids is None else own_pairs(x.query_ids, doc_m, x.weight, x.known)
        passes = gathered = told = None
        if columns != "none":
            copies_n = None if kept is None else occurrences(shared.positive, len(shared.W)).double()
            arriving = gather_columns(shared, sizes, copies_n, pairs, tile, group)
            positive_m = _positive_scores(x, sizes, with_beta=direction != "d2q")
            gathered, told = arriving.wait()
            del arriving  # which would keep the gathered columns
        else:
            positive_m = _positive_scores(x, sizes, with_beta=True)
            told = None if pairs is None else gather_pairs(pairs, sizes.num_known, group)
        positives = find_known_positives(x.query_ids, doc_m, x.weight, x.known, told, sizes.known_counts)
        if gathered is not None:
            mask = find_false_negatives(positives, gathered.docs, gathered.valid, gathered.total)
            passes = ScorePasses(shared, sizes, gathered, mask, group)
            del gathered
        column_mk, there_mk = negatives.clamp(min=0), negatives >= 0
        other_mk = there_mk & (column_mk != x.positive[:, None])
        known_mk = positives.contain(docs_n[column_mk])
        used_mk = other_mk & ~known_mk
        score_mk = score_listed(x, sizes.alpha, column_mk, used_mk)
        found = term.on_vectors(Scores(x.weight, positive_m, score_mk, used_mk, passes, direction, teacher))
        masked, entries = (other_mk & known_mk).sum().double(), there_mk.sum().double()
        if passes is not None:
            of_columns = passes.entries()
            entries, masked = entries + of_columns[0], masked + of_columns[1]
        local = LocalStats(x.weight, positive_m, found.largest_m, found.lse_m, entries, masked)
        loss, stats = reduce_output(found.value_m.sum(), local, sizes.weight_sum, group)
        loss = loss.to(x.acc)
        if sizes.wants:
            sums = Gradients.zeros(x, sizes.wants, n) if passes is None else _spread(passes.own_gradients(), kept, n)
            add_listed(x, column_mk, found.listed_grad_mk, sums)
            loss = attach(
                loss, (x.U, x.W, x.alpha, x.beta),
                finish_gradients(x, sizes, sums, found.positive_grad_m, found.beta_grad_m),
            )  # fmt: skip
        return LossOutput(loss, stats)


def _check_choice(
    term: Term | str, x: LossInputs, negatives: Tensor | None, teacher: Tensor | None, columns: str, direction: str,
    tile: int | None,
) -> None:  # fmt: skip
    need(isinstance(term, Term), f"the loss must be one of {', '.join(TERMS)}, got {term!r}")
    assert isinstance(term, Term)
    need(not term.judged or columns == "none", f"{term} looks at listed documents alone: it needs columns='none'")
    need(columns in _SHARED, f"columns must be one of {', '.join(_SHARED)}, got {columns!r}")
    allowed = term.directions if columns == "all" and negatives is None else ("q2d",)
    need(direction in allowed, f"direction must be one of {', '.join(allowed)}, got {direction!r}")
    need(tile is None or tile >= 1, f"tile must be at least 1, got {tile}")
    need(negatives is not None or columns != "none", f"{term} needs negatives, in_batch=True, or both")
    m = x.U.shape[0]
    if negatives is not None:
        kind = getattr(negatives, "dtype", type(negatives).__name__)
        need(kind == torch.int64, f"negatives must be int64, got {kind}")
        need(negatives.ndim == 2 and len(negatives) == m, f"negatives must be [{m}, k], got {list(negatives.shape)}")
    check_teacher(term, teacher, m, 0 if negatives is None else negatives.shape[1])


def _share(x: LossInputs, columns: str, group: Group | None) -> tuple[LossInputs, LossInputs, Tensor | None]:
    """Return x, the part of it that is gathered, and which columns that part keeps (None: all).

    Where some are left out document ids are needed, for columns are told apart by them; `positive` counts among those
    kept.
    """
    if columns == "all":
        return x, x, None
    if x.doc_ids is None:
        first = distributed.rank(group) << 40
        x = replace(x, doc_ids=torch.arange(first, first + x.W.shape[0], device=x.W.device))
    # what lies outside is refused when all ranks are told, not here
    positive = x.positive.clamp(0, max(0, x.W.shape[0] - 1))
    kept, positive = torch.unique(positive[: None if columns == "in_batch" else 0], return_inverse=True)
    names = ("W", "beta", "neg_bias", "doc_ids")
    part: dict[str, Any] = {name: None if (v := getattr(x, name)) is None else v.detach()[kept] for name in names}
    return x, replace(x, positive=positive, **part), kept


def _spread(sums: Gradients, kept: Tensor | None, n: int) -> Gradients:
    """Return the sums of the columns `kept` on all n columns."""
    if kept is None:
        return sums
    W, beta = (
        None if part is None else part.new_zeros((n, *part.shape[1:])).index_copy_(0, kept, part)
        for part in (sums.W, sums.beta)
    )
    return Gradients(sums.U, W, beta)


def _positive_scores(x: LossInputs, sizes: GlobalSizes, with_beta: bool) -> Tensor:
    """Return the scores of the positives, float64 [m]."""
    products = x.W.detach()[x.positive].to(x.acc).mul_(x.U.detach()).sum(1).double() * sizes.alpha
    return products if x.beta is None or not with_beta else products + x.beta.detach().double()[x.positive]
