"""The fine-tuning losses: softmax, PairCE, triplet and sigmoid over given negatives, in-batch negatives or both.

    out = ranking_loss("pair_ce", U, W, positive, alpha=alpha, negatives=negatives, in_batch=True, doc_ids=doc_ids)

Scores, masks, weights and the scale of loss and gradients are those of `fps_loss`; it is called in the same way, on
every rank at once. With S⁺ the positive's score and A_i query i's negatives:

    softmax   log(1 + Σ_j∈A exp(S⁻_j − S⁺))
    pair_ce   mean over A of −log σ(S⁺ − S⁻_j)
    triplet   mean over A of max(0, margin − S⁺ + S⁻_j)
    sigmoid   −log σ(S⁺) − Σ_j∈A log σ(−S⁻_j), usually with one beta for all documents: beta.expand(n)

averaged over queries by weight; neg_bias_j is part of S⁻_j. In-batch negatives are the documents of all other queries,
on any rank; given negatives are columns of this rank, for their query alone. Both count as often as they occur, so that
it makes no difference which rows share a rank, and thereby a column. A query without negatives adds nothing to pair_ce
and triplet.

Shape legend: m queries, n columns and k given negatives of this rank, N slots and c columns of a tile of the in-batch
columns, D vector size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.columns import Columns, gather_columns
from bigdssm.losses.given import Given, add_given, score_given
from bigdssm.losses.inputs import (
    WANTS_ALPHA,
    WANTS_BETA,
    WANTS_U,
    WANTS_W,
    Facts,
    LossInputError,
    LossInputs,
    check_inputs,
    exchange,
)
from bigdssm.losses.masks import DropPlan, plan_drops
from bigdssm.losses.output import (
    Gradients,
    LocalStats,
    LossOutput,
    attach,
    finish_gradients,
    reduce_output,
    reduce_sums,
    weighted,
)
from bigdssm.losses.pairwise import PairSums, Pairwise, pairwise_pass
from bigdssm.losses.softmax import RowSums, softmax_rows
from bigdssm.losses.tiles import TILE_WIDTH, Problem, Sums, add_biases, positive_scores, product_precision, softplus

RankingName = Literal["softmax", "pair_ce", "triplet", "sigmoid"]
RANKING_NAMES = ("softmax", "pair_ce", "triplet", "sigmoid")


def ranking_loss(
    name: RankingName,
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
    in_batch: bool = False,
    margin: float = 0.2,
    tile: int | None = None,
    group: Group | None = None,
) -> LossOutput:
    """Return a fine-tuning loss by name; a collective. See `fps_loss` for what it shares with it.

    negatives int64 [m, k]: columns of this rank, −1 where there is none. in_batch: also every other query's document.
    margin: of triplet.
    Raises: LossInputError (PeerError on the ranks whose own input is good), on every rank.
    Source: softmax and triplet, Karpukhin et al. 2020 and Schroff et al. 2015; pair_ce, Burges et al. 2005 (RankNet),
    eq. 3; sigmoid, Zhai et al. 2023 (SigLIP), eq. 1.
    """
    x: LossInputs | LossInputError
    try:
        x = check_inputs(
            U, W, positive, alpha=alpha, beta=beta, neg_bias=neg_bias, weight=weight,
            query_ids=query_ids, doc_ids=doc_ids, known=known,
        )  # fmt: skip
        _check_negatives(name, x, negatives, in_batch, tile)
    except LossInputError as error:
        x = error
    mode = 16 + 2 * RANKING_NAMES.index(name) + in_batch if name in RANKING_NAMES else -1
    # only what is a negative in the batch is gathered
    shown = x if isinstance(x, LossInputError) else _in_batch_part(x) if in_batch else _no_columns(x)
    checked, facts = exchange(shown, mode, getattr(U, "device", torch.device("cpu")), group)
    assert isinstance(x, LossInputs)
    if negatives is None:
        negatives = x.positive.new_zeros((x.positive.shape[0], 0))
    with torch.no_grad(), product_precision(x):
        shared = _gather_in_batch(checked, facts, tile or TILE_WIDTH, name == "softmax", group) if in_batch else None
        return _Ranking(x, facts, negatives, shared, group).output(Pairwise(name, margin))


def _check_negatives(name: str, x: LossInputs, negatives: Tensor | None, in_batch: bool, tile: int | None) -> None:
    if name not in RANKING_NAMES:
        raise LossInputError(f"the loss must be one of {', '.join(RANKING_NAMES)}, got {name!r}")
    if tile is not None and tile < 1:
        raise LossInputError(f"tile must be at least 1, got {tile}")
    if negatives is None:
        if not in_batch:
            raise LossInputError(f"{name} needs negatives, in_batch=True, or both")
        return
    if not isinstance(negatives, Tensor) or negatives.dtype != torch.int64:
        raise LossInputError(f"negatives must be int64, got {getattr(negatives, 'dtype', type(negatives).__name__)}")
    if negatives.ndim != 2 or negatives.shape[0] != x.U.shape[0]:
        raise LossInputError(f"negatives must be [{x.U.shape[0]}, k], got {list(negatives.shape)}")
    if negatives.numel() and not (int(negatives.min()) >= -1 and int(negatives.max()) < x.W.shape[0]):
        raise LossInputError(f"negatives hold a column outside -1 … {x.W.shape[0] - 1}")


def _in_batch_part(x: LossInputs) -> LossInputs:
    """Keep the columns that are positives; `positive` counts among those kept."""
    kept, positive = torch.unique(x.positive, return_inverse=True)
    return replace(_kept(x, kept), positive=positive)


def _no_columns(x: LossInputs) -> LossInputs:
    return replace(_kept(x, x.positive[:0]), positive=x.positive[:0])


def _kept(x: LossInputs, columns: Tensor) -> LossInputs:
    return replace(
        x,
        W=x.W.detach()[columns],
        beta=None if x.beta is None else x.beta.detach()[columns],
        neg_bias=None if x.neg_bias is None else x.neg_bias[columns],
        doc_ids=None if x.doc_ids is None else x.doc_ids[columns],
    )


@dataclass
class _InBatch:
    """The negatives that all ranks share."""

    part: LossInputs
    columns: Columns
    problem: Problem
    drops: DropPlan
    sums: Sums | None
    copies_N: Tensor  # float64: the queries whose document the column is

    def count_m(self) -> Tensor:
        """Return each query's number of negatives, for those of weight > 0 (their positives are in the drop set)."""
        return self.copies_N.sum() - self.drops.row_sums(self.copies_N)


def _gather_in_batch(part: LossInputs, facts: Facts, width: int, as_bias: bool, group: Group | None) -> _InBatch:
    """Gather the shared negatives; `as_bias`: their numbers of copies are part of the scores, as logarithms."""
    copies_n = torch.bincount(part.positive, minlength=part.W.shape[0]).double()
    copies_N = distributed.all_gather_padded(copies_n, facts.longest, group).wait()
    columns = gather_columns(part, facts, width, group)
    drops = plan_drops(part, columns)
    bias_N = add_biases(columns.beta, columns.neg_bias)
    bias_N = add_biases(bias_N, copies_N.log()) if as_bias else bias_N
    U_mD = part.U.detach().to(part.acc)
    bias_N = None if bias_N is None else bias_N.to(part.acc)
    problem = Problem(U_mD, columns, drops, float(part.alpha.detach()), bias_N)
    sums = Sums.like(part, facts, columns) if facts.wants else None
    return _InBatch(part, columns, problem, drops, sums, copies_N)


@dataclass
class _Terms:
    """Per query: weighted term, minus its gradient by S⁺, best negative, log-sum-exp; and G of the given negatives."""

    term_m: Tensor
    pull_m: Tensor
    largest_m: Tensor
    lse_m: Tensor
    G_mk: Tensor


@dataclass
class _Ranking:
    """One call of `ranking_loss`, its input gathered."""

    x: LossInputs
    facts: Facts
    negatives_mk: Tensor
    in_batch: _InBatch | None
    group: Group | None

    def output(self, loss: Pairwise) -> LossOutput:
        given = score_given(self.x, self.facts, self.negatives_mk, self.group)
        positive_m = positive_scores(self.x)
        terms = self._softmax(given, positive_m) if loss.name == "softmax" else self._pairwise(loss, given, positive_m)
        value, stats = reduce_output(self._local_stats(given, terms, positive_m), self.facts.weight_sum, self.group)
        if not self.facts.wants:
            return LossOutput(attach(value, self.x, None), stats)
        grads = self._own_sums()
        add_given(self.x, given, terms.G_mk, grads)
        grads = finish_gradients(self.x, self.facts, grads, terms.pull_m, terms.pull_m)
        return LossOutput(attach(value, self.x, grads), stats)

    def _softmax(self, given: Given, positive_m: Tensor) -> _Terms:
        weight_m = self.x.weight
        rows = RowSums(torch.logsumexp(given.score_mk, 1), _largest(given.score_mk))
        if self.in_batch is not None:
            found = softmax_rows(self.in_batch.problem, positive_m, weight_m, rows.log_sum, self.in_batch.sums)
            rows = RowSums(found.log_sum, torch.maximum(found.largest, rows.largest))
        lse_m = torch.logaddexp(rows.log_sum, positive_m)
        above_m = rows.log_sum - positive_m
        G_mk = weighted(weight_m[:, None], (given.score_mk - lse_m[:, None]).exp())
        pull_m = weighted(weight_m, torch.sigmoid(above_m))
        return _Terms(weighted(weight_m, softplus(above_m)), pull_m, rows.largest, lse_m, G_mk)

    def _pairwise(self, loss: Pairwise, given: Given, positive_m: Tensor) -> _Terms:
        weight_m = self.x.weight
        count_m = given.used_mk.sum(1) + (0 if self.in_batch is None else self.in_batch.count_m())
        scale_m = torch.where(weight_m > 0, weight_m, 0.0)
        if loss.relative:
            scale_m = torch.where(count_m > 0, scale_m / count_m.clamp(min=1), 0.0)
        pairs = PairSums.zero(positive_m)
        if self.in_batch is not None:
            shared = self.in_batch
            pairs = pairwise_pass(shared.problem, loss, positive_m, scale_m, shared.copies_N, shared.sums)
        value_mk, slope_mk = loss.value_and_slope(given.score_mk.clone(), positive_m[:, None])
        slope_m = weighted(scale_m, pairs.slope + slope_mk.sum(1))
        own_m, own_slope_m = loss.positive_term(positive_m)
        term_m = weighted(scale_m, pairs.value + value_mk.sum(1)) + weighted(weight_m, own_m)
        pull_m = slope_m if loss.relative else weighted(weight_m, own_slope_m)
        largest_m = torch.maximum(pairs.largest, _largest(given.score_mk))
        best_m = torch.maximum(largest_m, positive_m)
        return _Terms(term_m, pull_m, largest_m, best_m, weighted(scale_m[:, None], slope_mk))

    def _own_sums(self) -> Gradients:
        """Return this rank's sums over the in-batch negatives, on all its columns; zeros where there are none."""
        x, wants = self.x, self.facts.wants
        grads = Gradients(
            U=torch.zeros(x.U.shape, dtype=x.acc, device=x.U.device) if wants & (WANTS_U | WANTS_ALPHA) else None,
            W=torch.zeros(x.W.shape, dtype=x.acc, device=x.W.device) if wants & WANTS_W else None,
            beta=torch.zeros(x.W.shape[0], dtype=torch.float64, device=x.W.device) if wants & WANTS_BETA else None,
        )
        if self.in_batch is not None and self.in_batch.sums is not None:
            kept = torch.unique(x.positive)
            reduced = reduce_sums(self.in_batch.sums, kept.shape[0], self.group)
            grads.U = reduced.U
            if grads.W is not None and reduced.W is not None:
                grads.W[kept] = reduced.W
            if grads.beta is not None and reduced.beta is not None:
                grads.beta[kept] = reduced.beta
        return grads

    def _local_stats(self, given: Given, terms: _Terms, positive_m: Tensor) -> LocalStats:
        used = self.x.weight > 0
        m = float(self.x.U.shape[0])
        local = LocalStats(
            loss_sum=terms.term_m.sum(),
            correct=((positive_m > terms.largest_m) & used).sum(),
            judged=used.sum(),
            dropped=float(given.num_dropped),
            entries=float(given.num_listed),
            queries=m,
            lse=terms.lse_m[used],
        )
        if self.in_batch is not None:
            own = self.in_batch.part.positive + self.in_batch.columns.own_start
            in_X = self.in_batch.drops.contains(torch.arange(int(m), device=own.device), own)
            local.dropped += float(self.in_batch.drops.row_sums(self.in_batch.copies_N).sum() - in_X.sum())
            local.entries += m * (float(self.in_batch.copies_N.sum()) - 1)
        return local


def _largest(score_mk: Tensor) -> Tensor:
    if score_mk.shape[1] == 0:
        return score_mk.new_full((score_mk.shape[0],), -torch.inf)
    return score_mk.amax(1)
