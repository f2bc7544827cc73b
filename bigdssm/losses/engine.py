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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.distillation import check_teacher
from bigdssm.losses.inputs import GlobalSizes, LossInputError, LossInputs, check_inputs, global_sizes, require
from bigdssm.losses.kernels import Gradients, ScorePasses, gather_columns, product_precision, triton_passes
from bigdssm.losses.masks import find_false_negatives, find_known_positives, gather_pairs, occurrences, own_pairs
from bigdssm.losses.output import LocalStats, LossOutput, attach, finish_gradients, reduce_output
from bigdssm.losses.terms import TERMS, Scores, Softmax, Term, find_term

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
    if isinstance(shared, LossInputs) and triton_passes.available(shared):
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
        score_mk = score_candidates(x, sizes.alpha, column_mk, used_mk)
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
            add_candidates(x, column_mk, found.candidate_grad_mk, sums)
            loss = attach(
                loss, (x.U, x.W, x.alpha, x.beta),
                finish_gradients(x, sizes, sums, found.positive_grad_m, found.beta_grad_m),
            )  # fmt: skip
        return LossOutput(loss, stats)


def _check_choice(
    term: Term | str, x: LossInputs, negatives: Tensor | None, teacher: Tensor | None, columns: str, direction: str,
    tile: int | None,
) -> None:  # fmt: skip
    require(isinstance(term, Term), f"the loss must be one of {', '.join(TERMS)}, got {term!r}")
    assert isinstance(term, Term)
    require(not term.judged or columns == "none", f"{term} looks at listed documents alone: it needs columns='none'")
    require(columns in _SHARED, f"columns must be one of {', '.join(_SHARED)}, got {columns!r}")
    allowed = term.directions if columns == "all" and negatives is None else ("q2d",)
    require(direction in allowed, f"direction must be one of {', '.join(allowed)}, got {direction!r}")
    require(tile is None or tile >= 1, f"tile must be at least 1, got {tile}")
    require(negatives is not None or columns != "none", f"{term} needs negatives, in_batch=True, or both")
    m = x.U.shape[0]
    if negatives is not None:
        kind = getattr(negatives, "dtype", type(negatives).__name__)
        require(kind == torch.int64, f"negatives must be int64, got {kind}")
        require(negatives.ndim == 2 and len(negatives) == m, f"negatives must be [{m}, k], got {list(negatives.shape)}")
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


_CHUNK_ELEMENTS = 1 << 22  # of the negatives' vectors at a time


def score_candidates(x: LossInputs, alpha: float, column_mk: Tensor, used_mk: Tensor) -> Tensor:
    """Return the scores float64 [m, k] of the columns, −inf where not `used_mk`."""
    score = torch.full(column_mk.shape, -math.inf, dtype=torch.float64, device=column_mk.device)
    for rows, vectors in _chunks(x, column_mk):
        score[rows] = torch.einsum("md,mkd->mk", x.U.detach()[rows].to(x.acc), vectors).double() * alpha
    for bias in (x.beta, x.neg_bias) if x.W.shape[0] else ():
        score = score if bias is None else score + bias.detach().double()[column_mk]
    return torch.where(used_mk, score, -math.inf)


def add_candidates(x: LossInputs, column_mk: Tensor, G_mk: Tensor, sums: Gradients) -> None:
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
    """Return the softmax loss over all documents of all ranks; a collective. See `contrastive_loss` for the arguments.

    Source: Yi et al. 2019 (in-batch softmax); the two-direction form is that of Radford et al. 2021, eq. in figure 3.
    """
    return contrastive_loss(
        Softmax(), U, W, positive, alpha=alpha, beta=beta, neg_bias=neg_bias, weight=weight, query_ids=query_ids,
        doc_ids=doc_ids, known=known, direction=direction, tile=tile, group=group,
    )  # fmt: skip


RANKING_NAMES = tuple(TERMS)


def ranking_loss(
    name: str, U: Tensor, W: Tensor, positive: Tensor | None = None, *, in_batch: bool = False, margin: float = 0.2,
    **arguments: Any,
) -> LossOutput:  # fmt: skip
    """Return the loss of the term `name`; a collective. in_batch: also every other query's document is a negative.

    margin: of triplet. See `terms` for the formulas, and `contrastive_loss` for the arguments.
    """
    term = find_term(name, {"margin": margin})
    return contrastive_loss(term, U, W, positive, columns="in_batch" if in_batch else "none", **arguments)


def relevance_weight(relevance: Tensor, kind: Literal["indicator", "relevance"]) -> Tensor:
    """Return the weights [m] from relevance: 1[r > 0], or r. Raises: LossInputError where r is negative or NaN."""
    good = relevance.isfinite() & (relevance >= 0)
    if relevance.device.type == "cpu" and not bool(good.all()):  # on a device that would be waited for
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
    return global_mean((squares * weight).sum(), weight.sum(), group)


def global_mean(own: Tensor, own_total: Tensor, group: Group | None) -> Tensor:
    """Return Σ own / Σ own_total over all ranks, with gradients world_size times this rank's share."""
    sums = torch.stack([own.detach().double(), own_total.detach().double()])
    distributed.all_reduce(sums, "sum", group)
    factor = torch.where(sums[1] > 0, distributed.world_size(group) / sums[1], 0.0)
    share = own * factor.to(own.dtype)
    return share + (torch.where(sums[1] > 0, sums[0] / sums[1], 0.0).to(own.dtype) - share.detach())


def matryoshka_loss(
    loss: Callable[[Tensor, Tensor], LossOutput], U: Tensor, W: Tensor, widths: Sequence[int], normalise: bool
) -> LossOutput:
    """Return the mean of `loss` at the full width and at `widths`, everything else shared; statistics of the full one.

    Every rank calls it with the same widths. normalise: cut vectors get norm 1 again, for a cosine score. The scale of
    loss and gradients is that of `loss`. Source: Kusupati et al. 2022, eq. 1 with equal weights.
    """
    whole = loss(U, W)
    losses = [whole.loss, *(loss(cut(U, width, normalise), cut(W, width, normalise)).loss for width in widths)]
    return LossOutput(torch.stack(losses).mean(), whole.stats)


def cut(vectors: Tensor, width: int, normalise: bool) -> Tensor:
    """Return the first `width` entries of each vector [rows, D], with norm 1 where `normalise`."""
    first = vectors[:, :width]
    return torch.nn.functional.normalize(first, dim=1) if normalise else first
