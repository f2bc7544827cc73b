"""Losses as functions of positive and negative scores; `declarations` has the formulas and config keys.

Each returns its values and their gradients by the scores.

Shape legend: m queries of this rank and k candidates per query, l = 1 + k with its positive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdssm.losses.inputs import weighted
from bigdssm.losses.kernels import GradientSums, PairSums, RowSums, ScorePasses, value_and_derivative


@dataclass(frozen=True)
class Scores:
    """The input of a loss: scores of positives [m] and candidates [m, k], and passes over all other columns."""

    weight_m: Tensor  # float64, as are the scores
    positive_m: Tensor
    candidate_mk: Tensor  # −inf where not `used_mk`
    used_mk: Tensor  # whether a candidate is present and not masked
    passes: ScorePasses | None = None  # over the columns that are negatives of every query
    direction: str = "q2d"
    teacher_ml: Tensor | None = None  # a teacher's scores of the positive and the candidates


@dataclass
class TermResult:
    """Weighted values per query [m], their gradients by positive and candidate scores, and statistics.

    `column_gradients`: sums over the gradients by the scores of all other columns, as the passes return them.
    `beta_grad_m` is the part of `positive_grad_m` that depends on beta.
    """

    value_m: Tensor
    positive_grad_m: Tensor
    beta_grad_m: Tensor
    candidate_grad_mk: Tensor
    largest_m: Tensor  # the best negative's score
    lse_m: Tensor  # [m], or [2, m] of both directions
    column_gradients: GradientSums | None  # None without passes, or if no gradient is required


def softmax_term(scores: Scores) -> TermResult:
    """Compute the cross-entropy of the positive among its negatives; a collective."""
    if scores.direction != "q2d":
        return _softmax_over_queries(scores, with_rows=scores.direction == "both")
    weight_m, positive_m, column_gradients = scores.weight_m, scores.positive_m, None
    rows = RowSums(torch.logsumexp(scores.candidate_mk, 1), _largest(scores.candidate_mk))
    if scores.passes is not None:
        column_rows, column_gradients = scores.passes.softmax(positive_m, weight_m, rows.log_sum)
        rows = RowSums(column_rows.log_sum, torch.maximum(column_rows.largest, rows.largest))
    # value: log(1 + exp(above)); its derivative by the positive's score: −σ(above)
    above_m = rows.log_sum - positive_m
    lse_m = torch.logaddexp(rows.log_sum, positive_m)
    grad_m = -weighted(weight_m, torch.sigmoid(above_m))
    candidate_grad_mk = weighted(weight_m[:, None], (scores.candidate_mk - lse_m[:, None]).exp())
    value_m = weighted(weight_m, _softplus(above_m))
    return TermResult(value_m, grad_m, grad_m, candidate_grad_mk, rows.largest, lse_m, column_gradients)


def _softmax_over_queries(scores: Scores, with_rows: bool) -> TermResult:
    weight_m, positive_m, passes = scores.weight_m, scores.positive_m, scores.passes
    assert passes is not None
    log_sums = passes.log_sums(with_rows)
    row_share, column_share = (0.5, 0.5) if with_rows else (0.0, 1.0)
    lse_2m = torch.logaddexp(torch.stack([log_sums.of_positive_m, log_sums.rows.log_sum]), positive_m)
    value_m = column_share * _softplus(log_sums.of_positive_m - positive_m)
    if with_rows:
        value_m = value_m + row_share * _softplus(log_sums.rows.log_sum - positive_m)
    row_grad_m = weighted(weight_m, row_share * torch.sigmoid(log_sums.rows.log_sum - positive_m))
    column_grad_m = weighted(weight_m, column_share * torch.sigmoid(log_sums.of_positive_m - positive_m))
    column_gradients = passes.softmax_gradients(log_sums, with_rows, row_share * weight_m, lse_2m[1], column_grad_m)
    return TermResult(
        weighted(weight_m, value_m), -(row_grad_m + column_grad_m), -row_grad_m,
        torch.zeros_like(scores.candidate_mk),  # [m, 0]: there are no candidates in these directions
        log_sums.rows.largest, lse_2m if with_rows else lse_2m[0], column_gradients,
    )  # fmt: skip


def pair_term(scores: Scores, value: Callable[[Tensor], Tensor]) -> TermResult:
    """Compute a pairwise loss, `declarations.PairLoss`; a collective."""
    weight_m, positive_m, passes = scores.weight_m, scores.positive_m, scores.passes
    scale_m = torch.where(weight_m > 0, weight_m, 0.0)
    # the mean over the negatives
    count_m = scores.used_mk.sum(1) + (0 if passes is None else passes.num_negatives_m)
    scale_m = torch.where(count_m > 0, scale_m / count_m.clamp(min=1), 0.0)
    pairs, column_gradients = PairSums.zero(positive_m), None
    if passes is not None:
        pairs, column_gradients = passes.pairs(value, positive_m, scale_m)
    value_mk, slope_mk = value_and_derivative(value, scores.candidate_mk - positive_m[:, None])
    value_m = weighted(scale_m, pairs.value + value_mk.sum(1))
    grad_m = -weighted(scale_m, pairs.slope + slope_mk.sum(1))
    largest_m = torch.maximum(pairs.largest, _largest(scores.candidate_mk))
    best_m = torch.maximum(largest_m, positive_m)
    candidate_grad_mk = weighted(scale_m[:, None], slope_mk)
    return TermResult(value_m, grad_m, grad_m, candidate_grad_mk, largest_m, best_m, column_gradients)


def distillation_term(
    scores: Scores, value: Callable[[Tensor, Tensor, Tensor], Tensor], temperature: float
) -> TermResult:
    """Compute a distillation of teacher scores of candidates, `declarations.ListDistillation`."""
    assert scores.passes is None and scores.teacher_ml is not None, "its documents are candidates"
    # A query without a teacher score of its positive has no other valid document, and so no loss.
    scored_ml = scores.teacher_ml.isfinite()
    valid_ml = torch.cat([torch.ones_like(scored_ml[:, :1]), scored_ml[:, :1] & scored_ml[:, 1:] & scores.used_mk], 1)
    # filled before the loss, so that no −inf reaches a gradient
    S_ml = torch.cat([scores.positive_m[:, None], scores.candidate_mk], 1).masked_fill(~valid_ml, 0.0)
    T_ml = scores.teacher_ml.to(S_ml.dtype).masked_fill(~(valid_ml & scored_ml), 0.0) / temperature
    value_m, slope_ml = value_and_derivative(lambda S_ml: value(S_ml, T_ml, valid_ml), S_ml)
    grad_ml = weighted(scores.weight_m[:, None], slope_ml)
    S_ml = S_ml.masked_fill(~valid_ml, -torch.inf)
    return TermResult(
        weighted(scores.weight_m, value_m), grad_ml[:, 0], grad_ml[:, 0], grad_ml[:, 1:], _largest(S_ml[:, 1:]),
        S_ml.logsumexp(1), None,
    )  # fmt: skip


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), exact for all x (torch.nn.functional.softplus is linear above 20, an error of 2e-9)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _largest(score_mk: Tensor) -> Tensor:
    return torch.nn.functional.pad(score_mk, (0, 1), value=-torch.inf).amax(1)


def attach(loss: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return `loss` as an autograd node with the given gradients of its inputs; None inputs are skipped."""
    pairs = [(leaf, grad) for leaf, grad in zip(inputs, gradients, strict=True) if leaf is not None]
    leaves, grads = zip(*pairs, strict=True)
    with torch.enable_grad():
        result: Tensor = _Attach.apply(loss, len(pairs), *leaves, *grads)
    return result


class _Attach(torch.autograd.Function):
    """The identity on a value with precomputed gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, num: int, *tensors_and_gradients: Tensor | None) -> Tensor:
        inputs, gradients = tensors_and_gradients[:num], tensors_and_gradients[num:]
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs if t is not None]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would silently return 0 as the second derivative
            raise NotImplementedError("the losses have no second derivatives: differentiate without create_graph")
        results = [
            (gradient * upstream).to(device=device, dtype=dtype).view(shape)
            if needed and gradient is not None
            else None
            for needed, (shape, dtype, device), gradient in zip(
                ctx.needs_input_grad[2:], ctx.like, ctx.saved_tensors, strict=False
            )
        ]
        return None, None, *results, *[None] * len(ctx.like)
