"""The terms: what a loss makes of one query's positive score and those of its negatives, by name.

With S⁺ the positive's score, S⁻_j those of query i's negatives A_i:

    softmax   log(1 + Σ_j∈A exp(S⁻_j − S⁺));  also over the queries in the positive's column, or the mean of both
    pair_ce   mean over A of −log σ(S⁺ − S⁻_j)
    triplet   mean over A of max(0, margin − S⁺ + S⁻_j)
    sigmoid   −log σ(S⁺) − Σ_j∈A log σ(−S⁻_j), usually with one beta for all documents

A term says this twice: by hand on vectors, through `passes`, and by autograd on scores that a scorer has made. One of
single negatives is written down as its value and slope alone (`PairTerm`), from a module of anybody's:

    @dataclass(frozen=True)
    class Squared(PairTerm):
        name = "squared"
        def value(self, x): return (x + 1).clamp(min=0).square()
        def slope(self, x): return (x + 1).clamp_(min=0).mul_(2)

    register("squared", Squared)

Source: softmax and triplet, Karpukhin et al. 2020 and Schroff et al. 2015; pair_ce, Burges et al. 2005 (RankNet),
eq. 3; sigmoid, Zhai et al. 2023 (SigLIP), eq. 1.

Shape legend: m queries of this rank and k negatives listed for each, l = 1 + k with its positive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdssm.losses.kernels import PairSums, RowSums, ScorePasses
from bigdssm.utils.loss_options import LOSSES, LossOptions

TERMS: dict[str, type[Term]] = {}  # by name, of the losses over in-batch and listed negatives


def register(name: str, term: type[Term]) -> None:
    """Make `term` known to configs and losses as `name`, over in-batch and listed negatives.

    Its fields are filled with the loss's config keys of the same names. Raises: ValueError where the name is taken.
    """
    options = LossOptions(name, relative=term.relative)
    if LOSSES.setdefault(name, options) != options or TERMS.setdefault(name, term) is not term:
        raise ValueError(f"there is another loss called {name!r}: {LOSSES[name]}; give this one another name")


def find_term(name: Term | str, options: Mapping[str, Any]) -> Term | str:
    """Return the term `name`, its fields taken from `options`; one there is none of as it is: every loss refuses it."""
    if isinstance(name, Term) or name not in TERMS:
        return name
    own = {field.name for field in fields(TERMS[name])}
    return TERMS[name](**{key: value for key, value in options.items() if key in own})


@dataclass(frozen=True)
class Scores:
    """What a term is evaluated on: the positives' scores [m], those listed, and the passes over all others."""

    weight_m: Tensor  # float64, as are the scores
    positive_m: Tensor
    candidate_mk: Tensor  # −inf where there is none
    used_mk: Tensor  # where there is one
    passes: ScorePasses | None  # over the columns that are negatives of every query
    direction: str
    teacher_ml: Tensor | None = None  # a judge's scores of the positive and those listed, of a term that is `judged`


@dataclass
class Evaluated:
    """Per query [m]: weighted values, gradients by the positive's score, and by those listed [m, k]; statistics.

    The gradients by all other scores are with the passes. `beta_grad_m` is the part of `positive_grad_m` that beta has.
    """

    value_m: Tensor
    positive_grad_m: Tensor
    beta_grad_m: Tensor
    candidate_grad_mk: Tensor
    largest_m: Tensor  # the best negative's score
    lse_m: Tensor  # [m], or [2, m] of both directions


@dataclass(frozen=True)
class Term(ABC):
    """A loss's term; frozen, with its options as fields."""

    name: ClassVar[str]
    directions: ClassVar[tuple[str, ...]] = ("q2d",)
    relative: ClassVar[bool] = True  # sees only differences of a query's scores
    judged: ClassVar[bool] = False  # needs a judge's scores, see `distillation`

    def __str__(self) -> str:
        """Return the name and the options, for messages."""
        options = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"{self.name}({options})" if options else self.name

    @abstractmethod
    def on_vectors(self, scores: Scores) -> Evaluated:
        """Return the values and their gradients; a collective."""

    @abstractmethod
    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Return the values [m] as autograd needs them; `negative_mk` is −inf where not `used_mk`."""


@dataclass(frozen=True)
class Softmax(Term):
    """The cross-entropy of the positive among its negatives."""

    name = "softmax"
    directions = LOSSES["fps"].directions

    def on_vectors(self, scores: Scores) -> Evaluated:
        """Return the values and their gradients; a collective."""
        if scores.direction != "q2d":
            return self._over_queries(scores, with_rows=scores.direction == "both")
        weight_m, positive_m = scores.weight_m, scores.positive_m
        rows = RowSums(torch.logsumexp(scores.candidate_mk, 1), _largest(scores.candidate_mk))
        if scores.passes is not None:
            found = scores.passes.rows(positive_m, weight_m, rows.log_sum)
            rows = RowSums(found.log_sum, torch.maximum(found.largest, rows.largest))
        lse_m = torch.logaddexp(rows.log_sum, positive_m)
        above_m = rows.log_sum - positive_m
        grad_m = -weighted(weight_m, torch.sigmoid(above_m))
        candidate_grad_mk = weighted(weight_m[:, None], (scores.candidate_mk - lse_m[:, None]).exp())
        return Evaluated(
            weighted(weight_m, softplus(above_m)), grad_m, grad_m, candidate_grad_mk, rows.largest, lse_m
        )  # fmt: skip

    def _over_queries(self, scores: Scores, with_rows: bool) -> Evaluated:
        weight_m, positive_m, passes = scores.weight_m, scores.positive_m, scores.passes
        assert passes is not None
        found = passes.both(with_rows)
        row_share, column_share = (0.5, 0.5) if with_rows else (0.0, 1.0)
        lse_2m = torch.logaddexp(torch.stack([found.of_positive_m, found.rows.log_sum]), positive_m)
        value_m = column_share * softplus(found.of_positive_m - positive_m)
        if with_rows:
            value_m = value_m + row_share * softplus(found.rows.log_sum - positive_m)
        row_grad_m = weighted(weight_m, row_share * torch.sigmoid(found.rows.log_sum - positive_m))
        column_grad_m = weighted(weight_m, column_share * torch.sigmoid(found.of_positive_m - positive_m))
        found.add(row_share * weight_m, lse_2m[1], column_grad_m)
        return Evaluated(
            weighted(weight_m, value_m), -(row_grad_m + column_grad_m), -row_grad_m, scores.candidate_mk,
            found.rows.largest, lse_2m if with_rows else lse_2m[0],
        )  # fmt: skip

    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Return the values [m] as autograd needs them."""
        return torch.logsumexp(torch.cat([positive_m[:, None], negative_mk], 1), 1) - positive_m


class PairTerm(Term):
    """A term of one negative at a time, a function of x: S⁻ − S⁺, or S⁻ where it is not `relative`.

    A relative one is averaged over the query's negatives (0 without any). Another is summed over them, with the same
    function of −S⁺ for the positive.
    """

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return the term, elementwise, as autograd needs it."""

    @abstractmethod
    def slope(self, x: Tensor) -> Tensor:
        """Return its derivative; may overwrite x, which is −inf where there is no negative: 0 there."""

    def on_vectors(self, scores: Scores) -> Evaluated:
        """Return the values and their gradients; a collective."""
        weight_m, positive_m, passes = scores.weight_m, scores.positive_m, scores.passes
        scale_m = torch.where(weight_m > 0, weight_m, 0.0)
        if self.relative:
            count_m = scores.used_mk.sum(1) + (0 if passes is None else passes.num_negatives_m)
            scale_m = torch.where(count_m > 0, scale_m / count_m.clamp(min=1), 0.0)
        pairs = PairSums.zero(positive_m)
        if passes is not None:
            pairs = passes.pairs(self._value_and_slope, positive_m, scale_m)
        value_mk, slope_mk = self._value_and_slope(scores.candidate_mk.clone(), positive_m[:, None])
        value_m = weighted(scale_m, pairs.value + value_mk.sum(1))
        if self.relative:
            grad_m = -weighted(scale_m, pairs.slope + slope_mk.sum(1))
        else:
            value_m = value_m + weighted(weight_m, self.value(-positive_m))
            grad_m = -weighted(weight_m, self.slope(-positive_m))
        largest_m = torch.maximum(pairs.largest, _largest(scores.candidate_mk))
        best_m = torch.maximum(largest_m, positive_m)
        return Evaluated(value_m, grad_m, grad_m, weighted(scale_m[:, None], slope_mk), largest_m, best_m)

    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Return the values [m] as autograd needs them."""
        # what is not used is filled before and after: no −inf reaches a gradient
        x_mk = negative_mk.masked_fill(~used_mk, 0.0)
        values_mk = self.value(x_mk - positive_m[:, None] if self.relative else x_mk)
        sum_m = values_mk.masked_fill(~used_mk, 0.0).sum(1)
        return sum_m / used_mk.sum(1).clamp(min=1) if self.relative else sum_m + self.value(-positive_m)

    def _value_and_slope(self, S: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites S; `positive` broadcasts."""
        if self.relative:
            S -= positive
        return self.value(S), self.slope(S)


@dataclass(frozen=True)
class PairCE(PairTerm):
    """The logistic loss of a pair's order."""

    name = "pair_ce"

    def value(self, x: Tensor) -> Tensor:
        """Return the term."""
        return softplus(x)

    def slope(self, x: Tensor) -> Tensor:
        """Return its derivative."""
        return x.sigmoid_()


@dataclass(frozen=True)
class Sigmoid(PairCE):
    """The logistic loss of whether a document is the query's."""

    name = "sigmoid"
    relative = False


@dataclass(frozen=True)
class Triplet(PairTerm):
    """The hinge of a pair's order, with a margin in score units."""

    name = "triplet"
    margin: float = 0.2

    def value(self, x: Tensor) -> Tensor:
        """Return the term."""
        return (x + self.margin).clamp(min=0)

    def slope(self, x: Tensor) -> Tensor:
        """Return its derivative."""
        return (x > -self.margin).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), exact for all x (torch's own is cut off at 20, an error of 2e-9)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def weighted(weight_m: Tensor, values_m: Tensor) -> Tensor:
    """Return weight · value, 0 where the weight is 0 whatever the value."""
    return torch.where(weight_m > 0, weight_m * values_m, 0.0)


def _largest(score_mk: Tensor) -> Tensor:
    if score_mk.shape[1] == 0:
        return score_mk.new_full((score_mk.shape[0],), -torch.inf)
    return score_mk.amax(1)


for _term in (Softmax, PairCE, Triplet, Sigmoid):
    register(_term.name, _term)
