"""The FPS loss for extreme input: large alpha, aligned and long vectors, no negatives, zero weights."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigdssm.losses import (
    LossInputError,
    PairCE,
    PairLoss,
    Softmax,
    Triplet,
    fps_loss,
    ranking_loss,
)
from bigdssm.losses.reference import dense_loss
from tests.unit.losses.numerics import DOUBLE, NarrowProducts, unit
from tools.checks.pages import code_of

DIRECTIONS = ("q2d", "d2q", "both")


def fps_gradients(
    U: Tensor, W: Tensor, alpha: float, direction: str, **arguments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    U, W = (t.detach().clone().requires_grad_() for t in (U, W))
    loss = fps_loss(U, W, alpha=alpha, direction=direction, tile=16, **arguments).loss
    loss.backward()
    assert U.grad is not None and W.grad is not None
    return loss.detach(), U.grad, W.grad


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_callers_autocast_changes_nothing(direction: str) -> None:
    """It would round the scores, and in-place additions would go to a copy."""
    U, W = unit(40, 8, 1).float(), unit(50, 8, 2).float()
    negatives = torch.arange(80).view(40, 2) % 50

    def ranking(U: Tensor, W: Tensor) -> Tensor:
        return ranking_loss(Softmax(), U, W, alpha=100.0, in_batch=True, negatives=negatives).loss

    def fps(U: Tensor, W: Tensor) -> Tensor:
        return fps_loss(U, W, alpha=100.0, direction=direction).loss  # type: ignore[arg-type]

    for loss in (fps, ranking):
        plain, inside = (t.clone().requires_grad_() for t in (U, U))
        expected = loss(plain, W)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(inside, W)
        assert torch.equal(value, expected)
        assert torch.equal(*(torch.autograd.grad(v, leaf)[0] for v, leaf in ((value, inside), (expected, plain))))


def test_the_hinge_has_derivative_0_at_its_kink() -> None:
    U = torch.tensor([[1.0, 0.0]], requires_grad=True)
    W = torch.tensor([[0.75, 0.0], [0.5, 0.0]], requires_grad=True)
    negatives = torch.tensor([[1]])
    out = ranking_loss(Triplet(margin=0.25), U, W, torch.tensor([0]), alpha=1.0, negatives=negatives)
    gradients = torch.autograd.grad(out.loss, (U, W))
    assert float(out.loss.detach()) == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss", [PairCE(), Triplet()], ids=lambda loss: loss.name)
def test_inference_mode_does_not_change_a_pairwise_loss(loss: PairLoss) -> None:
    def value() -> Tensor:
        negatives = torch.tensor([[1], [2], [3], [-1]])
        return ranking_loss(loss, unit(4, 8, 1), unit(4, 8, 2), alpha=3.0, in_batch=True, negatives=negatives).loss

    with torch.inference_mode():
        found = value()
    assert torch.equal(found, value())


class Everywhere(PairLoss):
    def value(self, x: Tensor) -> Tensor:
        return x.exp() + 1


class Undefined(PairLoss):
    def value(self, x: Tensor) -> Tensor:
        return x.clamp(max=0).exp() * x


@pytest.mark.parametrize("loss", [Everywhere("everywhere"), Undefined("undefined")])
def test_a_pairwise_loss_of_masked_entries_is_refused(loss: PairLoss) -> None:
    with pytest.raises(LossInputError, match="value and derivative must be 0 at x = -inf"):
        ranking_loss(loss, unit(2, 4, 1), unit(2, 4, 2), alpha=1.0, in_batch=True)


def test_a_second_derivative_is_refused() -> None:
    U = unit(4, 8, 1).requires_grad_()
    loss = fps_loss(U, unit(4, 8, 2), alpha=3.0).loss
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(loss, U, create_graph=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_memory_layout_and_the_size_of_ids_do_not_matter(direction: str) -> None:
    least, most = -(2**63), 2**63 - 1
    ids = torch.tensor([[most, 7], [most - 1, 7], [least, 7], [least + 1, 7], [most, 7], [1, 7]])[:, 0]
    U, W = unit(4, 5, 1).T, unit(12, 4, 2)[::2]
    assert not U.is_contiguous() and not W.is_contiguous() and not ids.is_contiguous()
    small = torch.unique(ids, return_inverse=True)[1]
    views = fps_loss(U, W, alpha=3.0, direction=direction, query_ids=ids[1:], doc_ids=ids)  # type: ignore[arg-type]
    plain = fps_loss(
        U.contiguous(), W.contiguous(), alpha=3.0, direction=direction,  # type: ignore[arg-type]
        query_ids=small[1:].contiguous(), doc_ids=small,
    )  # fmt: skip
    assert float(views.loss) == pytest.approx(float(plain.loss), rel=1e-12)
    assert views.stats["dropped_fraction"] == plain.stats["dropped_fraction"] > 0


def test_nothing_anywhere() -> None:
    for direction in DIRECTIONS:
        loss, dU, dW = fps_gradients(torch.zeros(0, 4), torch.zeros(0, 4), 2.0, direction)
        assert float(loss) == 0.0 and dU.shape == dW.shape == (0, 4)


def test_float32_products_are_never_narrowed() -> None:
    with NarrowProducts() as products:
        fps_gradients(unit(30, 8, 1).float(), unit(30, 8, 2).float(), 20.0, "both")
    assert products.narrowed == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_columns_dropped_but_one(direction: str) -> None:
    """If all columns hold one document, no negative is left: the loss is 0, and so is its gradient."""
    U, W = unit(6, 4, 1), unit(6, 4, 2)
    same = torch.zeros(6, dtype=torch.int64)
    for query_ids in (None, same):
        ids = {"doc_ids": same} if query_ids is None else {"doc_ids": torch.arange(6), "query_ids": query_ids}
        if query_ids is None and direction != "q2d":
            ids["query_ids"] = same
        loss, dU, dW = fps_gradients(U, W, 20.0, direction, **ids)
        assert float(loss) == 0.0
        assert not dU.any() and not dW.any()


def test_confident_queries_keep_their_small_loss() -> None:
    """log(1 + exp(−25)) is 1.4e-11, not 0 and not cut off."""
    U, W = torch.eye(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    assert float(fps_loss(U, W, alpha=25.0).loss) == pytest.approx(math.log1p(math.exp(-25)), rel=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_document_in_half_of_all_rows(direction: str) -> None:
    """The mask has m·N/4 entries, computed as a dense matrix per strip, and equals the direct one."""
    m = 200
    U = unit(m, 8, 1).requires_grad_()
    doc_ids = torch.arange(m)
    doc_ids[::2] = 0
    W = unit(m, 8, 2)[doc_ids].requires_grad_()
    loss = fps_loss(U, W, alpha=20.0, doc_ids=doc_ids, query_ids=torch.arange(m), direction=direction, tile=64).loss
    loss.backward()
    drop = doc_ids[:, None] == doc_ids[None, :]
    keep = ~drop | torch.eye(m, dtype=torch.bool)
    S = (20.0 * U @ W.T).masked_fill(~keep, -math.inf)
    rows, columns = (torch.nn.functional.cross_entropy(X, torch.arange(m)) for X in (S, S.T))
    expected = {"q2d": rows, "d2q": columns, "both": (rows + columns) / 2}[direction]
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    for leaf, right in zip((U, W), torch.autograd.grad(expected, (U, W)), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, right, rtol=1e-10, atol=1e-12)


def test_excluded_negatives() -> None:
    """neg_bias −inf excludes a column as a negative, not as a positive."""
    U, W = unit(5, 4, 1), unit(8, 4, 2)
    out = torch.zeros(8)
    out[[1, 6]] = -math.inf
    some = [0, 2, 3, 4, 5, 7]
    S = 9.0 * U @ W.T
    right = torch.stack([
        torch.logsumexp(S[i, sorted({*some, i})], 0) - S[i, i] for i in range(5)
    ]).mean()  # fmt: skip
    assert float(fps_loss(U, W, alpha=9.0, neg_bias=out).loss) == pytest.approx(float(right), rel=1e-12)


def test_the_page_shows_the_dense_definition() -> None:
    page = (Path(__file__).parents[3] / "docs/loss.md").read_text(encoding="utf-8")
    assert inspect.getsource(dense_loss) in code_of(page)
