"""Contrastive losses on vectors, exact over any number of ranks.

    out = fps_loss(U, W, alpha=alpha)
    out = contrastive_loss(PairCE(), LossBatch(U, W, alpha=alpha, negatives=negatives), columns="in_batch")
    out.loss.backward()

Every rank calls it, with or without a process group. U and W may be leaves (gradient cache): U.grad, W.grad, alpha.grad
and beta.grad then hold world_size times this rank's share. Back-propagated and averaged over ranks, as DeepSpeed and
DDP do, they give the gradient of the global loss. No other factor is needed.

Only W is gathered, gradients are computed together with the loss, and one tile of the score matrix exists at a time.
`reference` has the same losses as dense matrices. `contrastive_loss` reads from top to bottom: inputs (inputs.py), the
gather of columns (kernels/columns.py), scores, masks (masks.py), values and their gradients by scores (terms.py, with
the passes over tiles of kernels/), gradients of U, W, alpha and beta.

Shape legend: m queries, n columns and k candidates of this rank, N columns of all ranks, D vector size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import LOSSES, LossConfig
from bigdssm.distributed import Group
from bigdssm.losses.declarations import FPS, ListDistillation, PairLoss
from bigdssm.losses.ids import occurrences
from bigdssm.losses.inputs import (
    GlobalSizes,
    LossBatch,
    LossInputError,
    LossInputs,
    check_inputs,
    global_sizes,
    raise_on_all_ranks,
    require,
)
from bigdssm.losses.kernels import (
    GradientSums,
    ScorePasses,
    gather_columns,
    product_precision,
    triton_passes,
    value_and_derivative,
)
from bigdssm.losses.masks import (
    KnownPositives,
    Mask,
    MaskTimes,
    find_false_negatives,
    find_known_positives,
    gather_pairs,
    local_pairs,
)
from bigdssm.losses.terms import Scores, attach

Direction = Literal["q2d", "d2q", "both"]
SharedColumns = Literal["all", "in_batch", "none"]
_SHARED = {"all": "all columns", "in_batch": "in-batch negatives and candidates", "none": "candidates"}
_CHUNK_ELEMENTS = 1 << 22  # numbers of candidate vectors that are gathered at a time


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar, the same on every rank; `stats`: scalars without gradient, over all ranks.

    in_batch_accuracy: fraction of the queries with weight > 0 whose positive scores above all their negatives, by the
    scores of the loss; dropped_fraction: fraction of the entries except positives that the masks drop;
    effective_negatives: unmasked negatives per query; lse_min, lse_max: range of the log-sum-exps (for losses without
    one, of the queries' best scores).
    """

    loss: Tensor
    stats: dict[str, Tensor]


def fps_loss(
    U: Tensor,
    W: Tensor,
    positive: Tensor | None = None,
    *,
    alpha: Tensor | float,
    direction: Direction = "q2d",
    tile: int | None = None,
    group: Group | None = None,
    **optional: Tensor | None,
) -> LossOutput:
    """Compute the softmax loss over all documents of all ranks; a collective.

    U [m, D] queries, W [n, D] documents, positive [m] the column of each query's document, arange(m) by default.
    optional: beta, neg_bias, weight, query_ids, doc_ids, known, time, since, as in `LossBatch`. See `contrastive_loss`.
    Source: Yi et al. 2019 (in-batch softmax); the two-direction form is that of Radford et al. 2021, eq. in figure 3.
    """
    batch = LossBatch(U, W, positive, alpha=alpha, **optional)
    return contrastive_loss(FPS(direction=direction), batch, tile=tile, group=group)


def ranking_loss(
    loss: LossConfig,
    U: Tensor,
    W: Tensor,
    positive: Tensor | None = None,
    *,
    alpha: Tensor | float,
    in_batch: bool = False,
    tile: int | None = None,
    group: Group | None = None,
    **optional: Tensor | None,
) -> LossOutput:
    """Compute a loss over hard negatives, such as `Triplet(margin=0.1)`; a collective.

    in_batch: the documents of the other queries are negatives, too. optional: fields of `LossBatch`, mainly negatives
    [m, k].
    """
    batch = LossBatch(U, W, positive, alpha=alpha, **optional)
    return contrastive_loss(loss, batch, columns="in_batch" if in_batch else "none", tile=tile, group=group)


def contrastive_loss(
    loss: LossConfig | ListDistillation,
    batch: LossBatch,
    *,
    columns: SharedColumns = "all",
    tile: int | None = None,
    group: Group | None = None,
) -> LossOutput:
    """Compute a loss over the documents of all ranks, candidates, or both; a collective.

    columns: the negatives of every query in addition to its candidates: `all` columns of all ranks; `in_batch`, the
    documents of all other queries; or `none`. In-batch documents count as often as they occur: the loss does not depend
    on which rows share a rank, and thereby a column. tile: columns per tile.

    The loss is the same on every rank; products are float32 (float64 for float64 input), sums of exponentials float64.
    Raises: LossInputError (PeerError on ranks with valid input), on every rank.
    """
    # Validate this rank's input; exchange the sizes and value ranges of all ranks.
    try:
        named = describe_loss(loss)
        x = check_inputs(batch)
        direction = _check_choice(loss, named, x, columns, tile)
        x, shared_x, shared_index = _shared_columns(x, columns, group)
    except LossInputError as error:
        raise_on_all_ranks(error, getattr(batch.U, "device", torch.device("cpu")), group)
    description = f"{named} over {_SHARED[columns]}, {direction}"
    if triton_passes.available(shared_x):
        description += ", by Triton kernels"
    sizes = global_sizes(x, shared_x, description, group)
    n = len(x.W)
    # without ids each column is a distinct document; its id is its global column index
    docs_n = torch.arange(n, device=x.W.device) + sizes.rank * sizes.longest if x.doc_ids is None else x.doc_ids
    doc_m = docs_n[x.positive]

    with torch.no_grad(), product_precision(x):
        # Gather the shared columns and the known positives of all ranks; meanwhile, score the positives.
        pairs = None if x.query_ids is None else local_pairs(x.query_ids, doc_m, x.known_weight, x.known)
        if columns == "none":
            gathered, all_pairs = None, None if pairs is None else gather_pairs(pairs, sizes.num_known, group)
            positive_m = _positive_scores(x, sizes, with_beta=True)
        else:
            counts_n = None if shared_index is None else occurrences(shared_x.positive, len(shared_x.W)).double()
            wait_for_columns = gather_columns(shared_x, sizes, counts_n, pairs, tile, group)
            # within a column, beta is constant and cancels
            positive_m = _positive_scores(x, sizes, with_beta=direction != "d2q")
            gathered, all_pairs = wait_for_columns()

        # Mask: a known positive of a query, on any rank, is not one of its negatives. This includes the row's own
        # positive: the mask removes its column from the sums over negatives, and the term adds its score, once.
        # Nor is a document that is available only after a query's time.
        known = find_known_positives(
            x.query_ids, doc_m, x.weight, x.known, all_pairs, sizes.known_counts, all_known=x.is_known is None
        )
        passes = None
        if gathered is not None:
            false_negatives = find_false_negatives(known, gathered.docs, gathered.valid, gathered.total)
            mask: Mask = false_negatives
            if x.time is not None and gathered.since is not None:
                mask = MaskTimes(false_negatives, x.time, gathered.since)
            passes = ScorePasses(shared_x, sizes, gathered, mask, group)
            del gathered  # `passes` frees the columns
        candidates = _Candidates(x, sizes, docs_n, known)
        if x.score_bias is not None:
            positive_m = positive_m + x.score_bias.detach()[:, 0]

        # The loss computes the scores S of the columns, a tile at a time (`ScorePasses`, `ScoreMatrix.scores`), without
        # the masked ones (`BlockMask.drop`). It returns its values per query; with G = dL/dS, the sums G W, Gᵀ U and
        # Σ G over the columns; and G of the positives and the candidates.
        result = loss.value_and_gradients(
            Scores(x.weight, positive_m, candidates.scores(), candidates.used_mk, passes, direction, x.teacher)
        )

        # The loss and the statistics, over all ranks.
        entries, masked = candidates.present_mk.sum().double(), candidates.masked_mk.sum().double()
        if passes is not None:
            column_entries, masked_columns = passes.entries()
            entries, masked = entries + column_entries, masked + masked_columns
        mean, stats = reduce_output(
            result.value_m.sum(), x.weight, positive_m, result.largest_m, result.lse_m, entries, masked,
            sizes.weight_sum, group,
        )  # fmt: skip
        mean = mean.to(x.acc)
        if not sizes.grad_flags:
            return LossOutput(mean, stats)

        # G of the shared columns, reduced to the ranks of its columns; then that of the candidates and the positives.
        if passes is None:
            gradients = GradientSums.zeros(x, sizes.grad_flags, n)
        else:
            gradients = passes.reduce_to_local(result.column_gradients)
            if shared_index is not None:  # from the shared columns to all columns of this rank
                gradients.W, gradients.beta = (
                    None if part is None else part.new_zeros((n, *part.shape[1:])).index_copy_(0, shared_index, part)
                    for part in (gradients.W, gradients.beta)
                )
        candidates.add_gradients(result.candidate_grad_mk, gradients)
        alpha_grad = _finish_gradients(x, sizes, gradients, result.positive_grad_m, result.beta_grad_m)
        G_ml = torch.cat([result.positive_grad_m[:, None], result.candidate_grad_mk], 1)
        bias_grad = None if x.score_bias is None else G_ml * sizes.gradient_factor
        inputs = x.U, x.W, x.alpha, x.beta, x.score_bias
        parts = gradients.U, gradients.W, alpha_grad, gradients.beta, bias_grad
        return LossOutput(attach(mean, inputs, parts), stats)


def describe_loss(loss: object) -> str:
    """Return the loss with the keys that affect its value, for messages and the comparison of ranks.

    Raises: LossInputError: not a loss, or a pairwise loss that is not 0 where a negative is masked.
    """
    require(
        isinstance(loss, LossConfig | ListDistillation),
        f"the loss must be one of {', '.join(LOSSES.names())}, got {loss!r}",
    )
    loss = cast(LossConfig | ListDistillation, loss)
    common = {"direction", *(f.name for f in fields(LossConfig))}
    keys = ", ".join(f"{f.name}={getattr(loss, f.name)!r}" for f in fields(loss) if f.name not in common)
    named = f"{loss.name}({keys})" if keys else loss.name
    if isinstance(loss, PairLoss):
        masked = [float(x) for x in value_and_derivative(loss.value, torch.tensor([-torch.inf]))]
        require(masked == [0, 0], f"{named}: value and derivative must be 0 at x = -inf (no negative), got {masked}")
    return named


def _check_choice(
    loss: LossConfig | ListDistillation, named: str, x: LossInputs, columns: str, tile: int | None
) -> str:
    """Validate the combination of arguments, and return the loss's direction."""
    is_distillation = isinstance(loss, ListDistillation)
    require(not is_distillation or columns == "none", f"{named} compares only candidates: it needs columns='none'")
    require(columns in _SHARED, f"columns must be one of {', '.join(_SHARED)}, got {columns!r}")
    m, negatives, direction = len(x.U), x.negatives, getattr(loss, "direction", "q2d")
    allowed = getattr(loss, "directions", ()) if columns == "all" and negatives is None else ("q2d",)
    require(direction in allowed, f"direction must be one of {', '.join(allowed)}, got {direction!r}")
    require(tile is None or tile >= 1, f"tile must be at least 1, got {tile}")
    require(negatives is not None or columns != "none", f"{named} needs negatives, in_batch=True, or both")
    if negatives is not None:
        kind = getattr(negatives, "dtype", type(negatives).__name__)
        require(kind == torch.int64, f"negatives must be int64, got {kind}")
        require(negatives.ndim == 2 and len(negatives) == m, f"negatives must be [{m}, k], got {list(negatives.shape)}")
    width = 0 if negatives is None else negatives.shape[1]
    require(
        is_distillation == (x.teacher is not None),
        f"{named} {'needs' if is_distillation else 'takes no'} scores of a teacher",
    )
    for name, scores in (("teacher", x.teacher), ("score_bias", x.score_bias)):
        if scores is not None:
            is_valid = scores.is_floating_point() and list(scores.shape) == [m, 1 + width]
            got = f"{scores.dtype} {list(scores.shape)}"
            require(is_valid, f"{name} must be floating point [{m}, {1 + width}], got {got}")
    is_allowed = x.score_bias is None or columns == "none"
    require(is_allowed, f"score_bias is of candidates: it needs columns='none', got {columns!r}")
    return str(direction)


def _shared_columns(x: LossInputs, columns: str, group: Group | None) -> tuple[LossInputs, LossInputs, Tensor | None]:
    """Return x, its columns that are negatives of every query, and their indices in x (None: all).

    A subset needs document ids, which identify its columns; its `positive` indexes the subset.
    """
    if columns == "all":
        return x, x, None
    if x.doc_ids is None:
        first = distributed.rank(group) << 40
        x = replace(x, doc_ids=torch.arange(first, first + x.W.shape[0], device=x.W.device))
    # values out of range are rejected later, on all ranks together
    positive = x.positive.clamp(0, max(0, x.W.shape[0] - 1))
    if columns == "none":
        positive = positive[:0]
    index, positive = torch.unique(positive, return_inverse=True)
    names = ("W", "beta", "neg_bias", "since", "doc_ids")
    subset: dict[str, Any] = {name: None if (v := getattr(x, name)) is None else v.detach()[index] for name in names}
    return x, replace(x, positive=positive, **subset), index


def _positive_scores(x: LossInputs, sizes: GlobalSizes, with_beta: bool) -> Tensor:
    """Return the scores of the positives, float64 [m]."""
    products = x.W.detach()[x.positive].to(x.acc).mul_(x.U.detach()).sum(1).double() * sizes.alpha
    return products if x.beta is None or not with_beta else products + x.beta.detach().double()[x.positive]


class _Candidates:
    """Masks, scores and gradients of the candidates [m, k] of this rank's queries."""

    def __init__(self, x: LossInputs, sizes: GlobalSizes, docs_n: Tensor, positives: KnownPositives) -> None:
        negatives = x.positive.new_zeros((len(x.U), 0)) if x.negatives is None else x.negatives
        self._x, self._alpha = x, sizes.alpha
        self._column_mk, self.present_mk = negatives.clamp(min=0), negatives >= 0
        other_mk = self.present_mk & (self._column_mk != x.positive[:, None])
        known_mk = positives.contain(docs_n[self._column_mk])
        if x.time is not None and x.since is not None:
            known_mk |= x.since[self._column_mk] > x.time[:, None]
        self.masked_mk, self.used_mk = other_mk & known_mk, other_mk & ~known_mk

    def scores(self) -> Tensor:
        """Return float64 [m, k], −inf where not `used_mk`."""
        x, column_mk = self._x, self._column_mk
        score = torch.full(column_mk.shape, -math.inf, dtype=torch.float64, device=column_mk.device)
        for rows, vectors in self._chunks():
            score[rows] = torch.einsum("md,mkd->mk", x.U.detach()[rows].to(x.acc), vectors).double() * self._alpha
        for bias in (x.beta, x.neg_bias) if x.W.shape[0] else ():
            score = score if bias is None else score + bias.detach().double()[column_mk]
        if x.score_bias is not None:
            score = score + x.score_bias.detach()[:, 1:]
        return torch.where(self.used_mk, score, -math.inf)

    def add_gradients(self, G_mk: Tensor, sums: GradientSums) -> None:
        """Add the candidates' G to the gradient sums of this rank's vectors and biases."""
        x, column_mk, G = self._x, self._column_mk, G_mk.to(self._x.acc)
        for rows, vectors in self._chunks():
            if sums.U is not None:
                sums.U[rows] += torch.einsum("mk,mkd->md", G[rows], vectors)
            if sums.W is not None:
                spread = G[rows][:, :, None] * x.U.detach()[rows].to(x.acc)[:, None, :]
                sums.W.index_add_(0, column_mk[rows].flatten(), spread.flatten(0, 1))
        if sums.beta is not None:
            sums.beta.index_add_(0, column_mk.flatten(), G_mk.flatten().to(sums.beta.dtype))

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, vectors of their candidates [rows, k, D])."""
        (m, k), x = self._column_mk.shape, self._x
        height = max(1, _CHUNK_ELEMENTS // max(1, k * x.W.shape[1]))
        for start in range(0, m if k else 0, height):
            rows = slice(start, start + height)
            yield rows, x.W.detach()[self._column_mk[rows]].to(x.acc)


def _finish_gradients(
    x: LossInputs, sizes: GlobalSizes, sums: GradientSums, positive_grad_m: Tensor, beta_grad_m: Tensor
) -> Tensor | None:
    """Turn the sums over G into the gradients of U, W and beta, in place; return the gradient of alpha.

    The score alpha <u_i, w_j> + beta_j has the gradient G_ij; `sums` lack the positives' gradients, of which
    beta_grad_m is the part that depends on beta. Every gradient is world_size times this rank's share.
    """
    factor = sizes.gradient_factor
    grad_m1 = positive_grad_m.to(x.acc)[:, None]
    U_mD, alpha_grad = x.U.detach().to(x.acc), None
    if sums.U is not None:
        sums.U.addcmul_(x.W.detach()[x.positive].to(x.acc), grad_m1)
        # of alpha: Σ_ij G_ij <u_i, w_j> = Σ_i <u_i, Σ_j G_ij w_j>
        alpha_grad = (sums.U * U_mD).sum(1).double().sum() * factor
        sums.U.mul_(sizes.alpha * factor)
    if sums.W is not None:
        sums.W.index_add_(0, x.positive, U_mD * grad_m1).mul_(sizes.alpha * factor)
    if sums.beta is not None:
        sums.beta.index_add_(0, x.positive, beta_grad_m.to(sums.beta.dtype)).mul_(factor)
    return alpha_grad


def reduce_output(
    value_sum: Tensor, weight_m: Tensor, positive_m: Tensor, largest_m: Tensor, lse_m: Tensor, entries: Tensor,
    masked: Tensor, weight_sum: float, group: Group | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the global loss and statistics; two small all-reduces.

    value_sum: of the weighted values; positive_m, largest_m: scores of the positives and the best negatives; lse_m [m],
    or [directions, m]; entries: number of score matrix entries except positives, of which `masked` are masked.
    weight_sum: over all ranks.
    """
    used = weight_m > 0
    above = ((positive_m > largest_m) & used).sum()
    counted = [value_sum, above, used.sum(), masked, entries, torch.ones_like(used).sum()]
    totals = torch.stack([count.double() for count in counted])
    distributed.all_reduce(totals, "sum", group)
    # One maximum over all ranks of (−lse, lse) gives −minimum and maximum; a rank may have no used query.
    ends = torch.where(used, torch.stack([-lse_m, lse_m]), -math.inf).double().flatten(1)
    extremes = distributed.all_reduce(torch.nn.functional.pad(ends, (0, 1), value=-math.inf).amax(1), "max", group)
    loss = totals[0] / weight_sum if weight_sum > 0 else torch.zeros_like(totals[0])
    stats = {
        "in_batch_accuracy": totals[1] / totals[2].clamp(min=1),
        "dropped_fraction": totals[3] / totals[4].clamp(min=1),
        "effective_negatives": (totals[4] - totals[3]) / totals[5].clamp(min=1),
        "lse_min": -extremes[0],
        "lse_max": extremes[1],
    }
    return loss, stats


def relevance_weight(relevance: Tensor, kind: Literal["indicator", "relevance"]) -> Tensor:
    """Return the weights [m]: 1[r > 0], or r. Raises: LossInputError: negative or non-finite r."""
    good = relevance.isfinite() & (relevance >= 0)
    if relevance.device.type == "cpu" and not bool(good.all()):  # on a GPU this check would synchronize
        raise LossInputError("relevance holds NaN, infinite or negative values")
    require(kind in ("indicator", "relevance"), f"weight must be indicator or relevance, got {kind!r}")
    weight = relevance > 0 if kind == "indicator" else relevance
    return weight.to(relevance.dtype if relevance.is_floating_point() else torch.float32)


def matryoshka_loss(
    loss: Callable[[Tensor, Tensor], LossOutput], U: Tensor, W: Tensor, widths: Sequence[int], normalize: bool
) -> LossOutput:
    """Average `loss` over the full width and the truncated `widths`.

    Every rank calls it with the same widths. Statistics are those of the full width. normalize: renormalize truncated
    vectors, for a cosine score. The scale of loss and gradients is that of `loss`. Source: Kusupati et al. 2022, eq. 1
    with equal weights.
    """
    full = loss(U, W)
    truncated = (loss(truncate(U, width, normalize), truncate(W, width, normalize)) for width in widths)
    losses = [full.loss, *(output.loss for output in truncated)]
    return LossOutput(torch.stack(losses).mean(), full.stats)


def truncate(vectors: Tensor, width: int, normalize: bool) -> Tensor:
    """Return the first `width` entries of each vector [rows, D], with `normalize` scaled to norm 1."""
    first = vectors[:, :width]
    return torch.nn.functional.normalize(first, dim=1) if normalize else first
