"""Terms that follow a judge's scores of a query's own document and of those listed for it, and look at no others.

With S_j our scores and T_j the judge's over the temperature, j over the documents that are judged, 0 the query's own:

    kl          Σ_j p_j (log p_j − log q_j),  p = softmax(T), q = softmax(S)
    margin_mse  mean over j > 0 of ((S_0 − S_j) − (T_0 − T_j))²

A judge's score that is not finite is none; a query whose own document has none, or no other, has no value. They are
losses of their own, which a stage adds to its loss:

    contrastive_loss(ListwiseKL(2.0), U, W, positive, alpha=alpha, negatives=negatives, teacher=teacher, columns="none")

Source: kl, Hinton et al. 2015, over a list, with the temperature on the judge's side alone (ours has alpha);
margin_mse, Hofstätter et al. 2020.

Shape legend: m queries and k documents listed for each, l = 1 + k with the query's own.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.losses.exchange import need
from bigdssm.losses.terms import Evaluated, Scores, Term, weighted


@dataclass(frozen=True)
class Distillation(Term):
    """A term that needs a judge's scores (`teacher`), which the temperature divides."""

    temperature: float = 1.0

    judged = True

    @abstractmethod
    def value(self, S_ml: Tensor, T_ml: Tensor, judged_ml: Tensor) -> Tensor:
        """Return the term [m], as autograd needs it; where not `judged_ml` both scores are 0. Column 0 always is."""

    @abstractmethod
    def slope(self, S_ml: Tensor, T_ml: Tensor, judged_ml: Tensor) -> Tensor:
        """Return its derivatives by the scores, 0 where not `judged_ml`."""

    def on_vectors(self, scores: Scores) -> Evaluated:
        """Return the values and their gradients; a collective."""
        assert scores.passes is None, "its documents are listed"
        inputs = self._inputs(scores.positive_m, scores.listed_mk, scores.used_mk, scores.teacher_ml)
        grad_ml = weighted(scores.weight_m[:, None], self.slope(*inputs))
        S_ml = inputs[0].masked_fill(~inputs[2], -torch.inf)
        largest_m = torch.cat([torch.full_like(S_ml[:, :1], -torch.inf), S_ml[:, 1:]], 1).amax(1)
        return Evaluated(
            weighted(scores.weight_m, self.value(*inputs)), grad_ml[:, 0], grad_ml[:, 0], grad_ml[:, 1:], largest_m,
            S_ml.logsumexp(1),
        )  # fmt: skip

    def on_scores(self, positive_m: Tensor, negative_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None) -> Tensor:
        """Return the values [m] as autograd needs them."""
        return self.value(*self._inputs(positive_m, negative_mk, used_mk, teacher_ml))

    def _inputs(
        self, positive_m: Tensor, listed_mk: Tensor, used_mk: Tensor, teacher_ml: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, the judge's over the temperature, and where both are; a query without them is left alone."""
        assert teacher_ml is not None
        found_ml = teacher_ml.isfinite()
        judged_ml = torch.cat([torch.ones_like(found_ml[:, :1]), found_ml[:, :1] & found_ml[:, 1:] & used_mk], 1)
        # what is not used is filled before: no −inf reaches a gradient
        S_ml = torch.cat([positive_m[:, None], listed_mk], 1).masked_fill(~judged_ml, 0.0)
        T_ml = teacher_ml.to(S_ml.dtype).masked_fill(~(judged_ml & found_ml), 0.0) / self.temperature
        return S_ml, T_ml, judged_ml


@dataclass(frozen=True)
class ListwiseKL(Distillation):
    """The divergence of our softmax over the judged documents from the judge's."""

    name = "kl"

    def value(self, S_ml: Tensor, T_ml: Tensor, judged_ml: Tensor) -> Tensor:
        """Return the term."""
        log_p, log_q = _log_softmax(T_ml, judged_ml), _log_softmax(S_ml, judged_ml)
        return (log_p.exp() * (log_p - log_q).masked_fill(~judged_ml, 0.0)).sum(1)

    def slope(self, S_ml: Tensor, T_ml: Tensor, judged_ml: Tensor) -> Tensor:
        """Return its derivatives."""
        return _log_softmax(S_ml, judged_ml).exp() - _log_softmax(T_ml, judged_ml).exp()


@dataclass(frozen=True)
class MarginMSE(Distillation):
    """The squared error of the margins by which a query's own document stands above the others."""

    name = "margin_mse"

    def value(self, S_ml: Tensor, T_ml: Tensor, judged_ml: Tensor) -> Tensor:
        """Return the term."""
        return self._error(S_ml, T_ml, judged_ml).square().sum(1) / _others(judged_ml)

    def slope(self, S_ml: Tensor, T_ml: Tensor, judged_ml: Tensor) -> Tensor:
        """Return its derivatives."""
        slope_mk = -2 * self._error(S_ml, T_ml, judged_ml) / _others(judged_ml)[:, None]
        return torch.cat([-slope_mk.sum(1, keepdim=True), slope_mk], 1)

    def _error(self, S_ml: Tensor, T_ml: Tensor, judged_ml: Tensor) -> Tensor:
        """Return [m, k], 0 where not judged."""
        excess_ml = S_ml - T_ml
        return (excess_ml[:, :1] - excess_ml[:, 1:]).masked_fill(~judged_ml[:, 1:], 0.0)


DISTILLATIONS: dict[str, type[Distillation]] = {term.name: term for term in (ListwiseKL, MarginMSE)}


def check_teacher(term: Term, teacher: Tensor | None, rows: int, width: int) -> None:
    """Raise LossInputError unless a judge's scores are there where the term needs them, [rows, 1 + width]."""
    need(term.judged == (teacher is not None), f"teacher goes with terms that follow a judge, and {term} is "
         f"{'one' if term.judged else 'none'}")  # fmt: skip
    if teacher is not None:
        fits = teacher.is_floating_point() and list(teacher.shape) == [rows, 1 + width]
        need(fits, f"teacher must be floating point [{rows}, {1 + width}], got {teacher.dtype} {list(teacher.shape)}")


def _log_softmax(x_ml: Tensor, kept_ml: Tensor) -> Tensor:
    return x_ml.masked_fill(~kept_ml, -torch.inf).log_softmax(1)


def _others(judged_ml: Tensor) -> Tensor:
    """Return how many documents but the own are judged, at least 1: [m]."""
    return judged_ml[:, 1:].sum(1).clamp(min=1)
