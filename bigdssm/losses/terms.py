"""Losses as functions of positive and negative scores; `declarations` has the formulas and config keys.

A term has two forms: explicit gradients on vectors, by passes over the score matrix, and autograd on the scores of a
scorer.

Shape legend: m queries of this rank and k candidates per query, l = 1 + k with its positive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdssm.config import DistillationConfig, LossConfig
from bigdssm.losses.inputs import require, weighted
from bigdssm.losses.kernels import GradientSums, PairSums, RowSums, ScorePasses


@dataclass(frozen=True)
class Scores:
    """The input of a term: scores of positives [m] and candidates [m, k], and passes over all other columns."""

    weight_m: Tensor  # float64, as are the scores
    positive_m: Tensor
    candidate_mk: Tensor  # −inf where not `used_mk`
    used_mk: Tensor  # whether a candidate is present and not masked
    passes: ScorePasses | None  # over the columns that are negatives of every query
    direction: str
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


class Term(ABC):
    """The function of scores that a loss or a distillation builds."""

    directions: ClassVar[tuple[str, ...]] = ("q2d",)
    uses_teacher: ClassVar[bool] = False  # needs a teacher's scores, see `distillation`

    def __init__(self, loss: LossConfig | DistillationConfig) -> None:
        self.loss = loss

    def __str__(self) -> str:
        """Format the loss with the keys that affect its value, for messages and the comparison of ranks."""
        common = {"direction", *(f.name for f in fields(LossConfig))}
        keys = ", ".join(f"{f.name}={getattr(self.loss, f.name)!r}" for f in fields(self.loss) if f.name not in common)
        return f"{self.loss.name}({keys})" if keys else self.loss.name

    @abstractmethod
    def on_vectors(self, scores: Scores) -> TermResult:
        """Compute the values and their gradients; a collective."""

    @abstractmethod
    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Compute the values [m], differentiable by autograd; `negative_mk` is −inf where not `used_mk`."""


class SoftmaxTerm(Term):
    """The cross-entropy of the positive among its negatives."""

    directions = ("q2d", "d2q", "both")

    def on_vectors(self, scores: Scores) -> TermResult:
        """Compute the values and their gradients; a collective."""
        if scores.direction != "q2d":
            return self._over_queries(scores, with_rows=scores.direction == "both")
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
        value_m = weighted(weight_m, softplus(above_m))
        return TermResult(value_m, grad_m, grad_m, candidate_grad_mk, rows.largest, lse_m, column_gradients)

    def _over_queries(self, scores: Scores, with_rows: bool) -> TermResult:
        weight_m, positive_m, passes = scores.weight_m, scores.positive_m, scores.passes
        assert passes is not None
        log_sums = passes.log_sums(with_rows)
        row_share, column_share = (0.5, 0.5) if with_rows else (0.0, 1.0)
        lse_2m = torch.logaddexp(torch.stack([log_sums.of_positive_m, log_sums.rows.log_sum]), positive_m)
        value_m = column_share * softplus(log_sums.of_positive_m - positive_m)
        if with_rows:
            value_m = value_m + row_share * softplus(log_sums.rows.log_sum - positive_m)
        row_grad_m = weighted(weight_m, row_share * torch.sigmoid(log_sums.rows.log_sum - positive_m))
        column_grad_m = weighted(weight_m, column_share * torch.sigmoid(log_sums.of_positive_m - positive_m))
        column_gradients = passes.softmax_gradients(log_sums, with_rows, row_share * weight_m, lse_2m[1], column_grad_m)
        return TermResult(
            weighted(weight_m, value_m), -(row_grad_m + column_grad_m), -row_grad_m,
            torch.zeros_like(scores.candidate_mk),  # [m, 0]: there are no candidates in these directions
            log_sums.rows.largest, lse_2m if with_rows else lse_2m[0], column_gradients,
        )  # fmt: skip

    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Compute the values [m], differentiable by autograd."""
        return torch.logsumexp(torch.cat([positive_m[:, None], negative_mk], 1), 1) - positive_m


class PairTerm(Term):
    """A pairwise loss, evaluated for one negative at a time."""

    loss: LossConfig

    def __init__(self, loss: LossConfig, value: Callable[[Tensor], Tensor]) -> None:
        """`value` as in `declarations.PairLoss`. Raises: LossInputError: it is not 0 where a negative is masked."""
        super().__init__(loss)
        self._value = value
        masked = value_and_derivative(value, torch.tensor([-torch.inf]))
        require(
            all(float(x) == 0 for x in masked),
            f"{self}: value and derivative must be 0 at x = -inf (no negative), got {[float(x) for x in masked]}",
        )

    def on_vectors(self, scores: Scores) -> TermResult:
        """Compute the values and their gradients; a collective."""
        weight_m, positive_m, passes, column_gradients = scores.weight_m, scores.positive_m, scores.passes, None
        scale_m = torch.where(weight_m > 0, weight_m, 0.0)
        if self.loss.relative:
            count_m = scores.used_mk.sum(1) + (0 if passes is None else passes.num_negatives_m)
            scale_m = torch.where(count_m > 0, scale_m / count_m.clamp(min=1), 0.0)
        pairs = PairSums.zero(positive_m)
        if passes is not None:
            pairs, column_gradients = passes.pairs(self._pair_values, positive_m, scale_m)
        value_mk, slope_mk = self._pair_values(scores.candidate_mk.clone(), positive_m[:, None])
        value_m = weighted(scale_m, pairs.value + value_mk.sum(1))
        if self.loss.relative:
            grad_m = -weighted(scale_m, pairs.slope + slope_mk.sum(1))
        else:
            positive_value_m, positive_slope_m = value_and_derivative(self._value, -positive_m)
            value_m = value_m + weighted(weight_m, positive_value_m)
            grad_m = -weighted(weight_m, positive_slope_m)
        largest_m = torch.maximum(pairs.largest, _largest(scores.candidate_mk))
        best_m = torch.maximum(largest_m, positive_m)
        candidate_grad_mk = weighted(scale_m[:, None], slope_mk)
        return TermResult(value_m, grad_m, grad_m, candidate_grad_mk, largest_m, best_m, column_gradients)

    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Compute the values [m], differentiable by autograd."""
        # filled before and after the loss, so that no −inf reaches a gradient
        x_mk = negative_mk.masked_fill(~used_mk, 0.0)
        values_mk = self._value(x_mk - positive_m[:, None] if self.loss.relative else x_mk)
        sum_m = values_mk.masked_fill(~used_mk, 0.0).sum(1)
        return sum_m / used_mk.sum(1).clamp(min=1) if self.loss.relative else sum_m + self._value(-positive_m)

    def _pair_values(self, S: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values and their derivatives; overwrites S; `positive` broadcasts."""
        if self.loss.relative:
            S -= positive
        return value_and_derivative(self._value, S)


class DistillationTerm(Term):
    """The term of a distillation of teacher scores of candidates."""

    uses_teacher = True
    loss: DistillationConfig

    def __init__(self, loss: DistillationConfig, value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """`value` as in `declarations.ListDistillation`."""
        super().__init__(loss)
        self._value = value

    def on_vectors(self, scores: Scores) -> TermResult:
        """Compute the values and their gradients; a collective."""
        assert scores.passes is None, "its documents are candidates"
        S_ml, T_ml, valid_ml = self._inputs(scores.positive_m, scores.candidate_mk, scores.used_mk, scores.teacher_ml)
        value_m, slope_ml = value_and_derivative(lambda S_ml: self._value(S_ml, T_ml, valid_ml), S_ml)
        grad_ml = weighted(scores.weight_m[:, None], slope_ml)
        S_ml = S_ml.masked_fill(~valid_ml, -torch.inf)
        largest_m = torch.cat([torch.full_like(S_ml[:, :1], -torch.inf), S_ml[:, 1:]], 1).amax(1)
        return TermResult(
            weighted(scores.weight_m, value_m), grad_ml[:, 0], grad_ml[:, 0], grad_ml[:, 1:],
            largest_m, S_ml.logsumexp(1), None,
        )  # fmt: skip

    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Return the values [m], differentiable by autograd."""
        return self._value(*self._inputs(positive_m, negative_mk, used_mk, teacher_ml))

    def _inputs(
        self, positive_m: Tensor, candidate_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, teacher scores over the temperature, and the mask where both exist.

        A query without a teacher score of its positive has no other valid document, and so no loss.
        """
        assert teacher_ml is not None
        scored_ml = teacher_ml.isfinite()
        valid_ml = torch.cat([torch.ones_like(scored_ml[:, :1]), scored_ml[:, :1] & scored_ml[:, 1:] & used_mk], 1)
        # filled before the loss, so that no −inf reaches a gradient
        S_ml = torch.cat([positive_m[:, None], candidate_mk], 1).masked_fill(~valid_ml, 0.0)
        T_ml = teacher_ml.to(S_ml.dtype).masked_fill(~(valid_ml & scored_ml), 0.0) / self.loss.temperature
        return S_ml, T_ml, valid_ml


def value_and_derivative(value: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return value(x), elementwise or summed over rows, and its derivatives by x, from autograd."""
    if torch.is_inference_mode_enabled():  # autograd is off, and no gradient is required
        return value(x), torch.zeros_like(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        result = value(leaf)
    (derivative,) = torch.autograd.grad(result, leaf, result.new_ones(()).expand_as(result))
    return result.detach(), derivative


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), exact for all x (torch.nn.functional.softplus is linear above 20, an error of 2e-9)."""
    return torch.logaddexp(x, torch.zeros_like(x))


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
        results: list[Tensor | None] = []
        for needed, (shape, dtype, device), gradient in zip(
            ctx.needs_input_grad[2:], ctx.like, ctx.saved_tensors, strict=False
        ):
            if needed and gradient is not None:
                results.append((gradient * upstream).to(device=device, dtype=dtype).view(shape))
            else:
                results.append(None)
        return None, None, *results, *[None] * len(ctx.like)


def _largest(score_mk: Tensor) -> Tensor:
    if score_mk.shape[1] == 0:
        return score_mk.new_full((score_mk.shape[0],), -torch.inf)
    return score_mk.amax(1)
