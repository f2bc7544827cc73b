"""Matryoshka: the mean of dense losses of truncated vectors, in value and every gradient, on 1, 2 and 3 ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdssm.losses import LossOutput, fps_loss, matryoshka_loss

from . import reference
from .parity import assert_parity, run
from .reference import Shard, make_shards
from .spawn import Pool

WIDTHS = (5, 2)


def at_widths(U: Tensor, W: Tensor, positive: Tensor, *, normalize: bool, **arguments: Any) -> LossOutput:
    return matryoshka_loss(partial(fps_loss, positive=positive, **arguments), U, W, WIDTHS, normalize)


def dense(shards: list[Shard], alpha: float, direction: str, normalize: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Return the mean over the widths of the dense loss, and the gradients of the full vectors by autograd."""
    losses, totals = [], [torch.zeros(()), torch.zeros(()), torch.zeros(()), None]
    for width in (shards[0].U.shape[1], *WIDTHS):
        U = torch.cat([s.U for s in shards]).requires_grad_()
        W = torch.cat([s.W for s in shards]).requires_grad_()
        whole = width == U.shape[1]
        cut_U, cut_W = (x[:, :width] / (x[:, :width].norm(dim=1, keepdim=True) if normalize and not whole else 1)
                        for x in (U, W))  # fmt: skip
        sizes = [len(s.U) for s in shards], [len(s.W) for s in shards]
        parts = zip(shards, cut_U.detach().split(sizes[0]), cut_W.detach().split(sizes[1]), strict=True)
        cut = [Shard(**{**vars(s), "U": u, "W": w}) for s, u, w in parts]
        loss, (dU, dW, d_alpha, d_beta) = reference.fps(cut, alpha, direction)
        torch.autograd.backward([cut_U, cut_W], [dU, dW])
        losses.append(loss)
        assert U.grad is not None and W.grad is not None
        found = [U.grad, W.grad, d_alpha, d_beta]
        totals = [None if new is None else (0 if old is None else old) + new / 3 for old, new in
                  zip(totals, found, strict=True)]  # fmt: skip
    return torch.stack(losses).mean(), totals


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sizes", [[(5, 7)], [(4, 6), (3, 3)], [(4, 6), (0, 0), (5, 9)]])
def test_is_the_mean_of_the_dense_losses(pools: dict[int, Pool], sizes: list[tuple[int, int]], normalize: bool) -> None:
    options = frozenset({"beta", "neg_bias", "weight", "query_ids", "doc_ids"})
    shards = make_shards(torch.Generator().manual_seed(7), sizes, 8, num_queries=4, num_docs=6, options=options)
    for direction in ("q2d", "both"):
        expected = dense(shards, 5.0, direction, normalize)
        found = run(pools, partial(at_widths, normalize=normalize), shards, 5.0, direction=direction)
        assert_parity(shards, 5.0, found, expected, 1e-9)


def test_without_widths_it_is_the_loss_itself() -> None:
    shard = make_shards(torch.Generator().manual_seed(1), [(4, 6)], 5)[0]
    U = shard.U.clone().requires_grad_()
    plain = fps_loss(U, shard.W, alpha=3.0)
    (expected,) = torch.autograd.grad(plain.loss, U)
    out = matryoshka_loss(partial(fps_loss, alpha=3.0), U, shard.W, (), True)
    (found,) = torch.autograd.grad(out.loss, U)
    assert torch.equal(found, expected) and torch.equal(out.loss, plain.loss) and out.stats == plain.stats
