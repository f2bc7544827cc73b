"""Run a loss on the ranks of a pool and compare it with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bigdssm.losses import masks

from . import reference
from .reference import DOUBLE, Shard
from .spawn import Pool

Loss = Callable[..., Any]


def run_rank(rank: int, world_size: int, loss: Loss, shards: list[Shard], alpha: float, arguments: Any) -> Any:
    """Return the loss, the gradients of U, W, alpha, beta and the stats of one rank."""
    shard = shards[rank]
    U, W = shard.U.clone().requires_grad_(), shard.W.clone().requires_grad_()
    a = torch.tensor([alpha], dtype=DOUBLE if U.dtype == DOUBLE else torch.float32, requires_grad=True)
    optional = shard.arguments()
    given = None
    if shard.beta is not None:
        given = optional["beta"] = shard.beta.clone().requires_grad_()
    out = loss(U, W, shard.positive, alpha=a, **optional, **arguments)
    out.loss.backward()
    return out.loss.detach(), [U.grad, W.grad, a.grad, None if given is None else given.grad], out.stats


def run(
    pools: dict[int, Pool],
    loss: Loss,
    shards: list[Shard],
    alpha: float,
    **arguments: Any,
) -> tuple[Tensor, list[Any], Any]:
    """Return the loss and the gradients, averaged over ranks."""
    R = len(shards)
    call = (loss, shards, alpha, arguments)
    return mean_over_ranks(pools[R].run(run_rank, *call) if R > 1 else [run_rank(0, 1, *call)])


def mean_over_ranks(results: list[Any]) -> tuple[Tensor, list[Any], Any]:
    """Average the results of `run_rank` over ranks."""
    R = len(results)
    value = torch.stack([r[0] for r in results]).mean()
    grads = [r[1] for r in results]
    U, W = (torch.cat([g[k] for g in grads]) / R for k in (0, 1))
    alpha_grad = torch.stack([g[2] for g in grads]).mean(0)
    beta_grad = None
    if grads[0][3] is not None:
        beta_grad = torch.cat([g[3] for g in grads]) / R
    for r in results[1:]:
        assert r[2] == results[0][2], "the statistics are those of all ranks"
    return value, [U, W, alpha_grad, beta_grad], results[0][2]


def with_dense_mask(loss: Loss, *tensors: Any, **arguments: Any) -> Any:
    """Force the dense mask, which is otherwise used only for many pairs of a larger batch."""
    with mock.patch.multiple(masks, _MATRIX_CELLS=0, _MATRIX_FROM=0):
        return loss(*tensors, **arguments)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, term: float = 1.0) -> None:
    """Compare relative to max(largest entry, term / 100).

    `term` is the magnitude of summands that cancel.
    """
    if expected.numel():
        scale = max(float(expected.abs().max()), 0.01 * term)
        error = float((actual.double() - expected).abs().max()) / scale
        assert error <= tolerance, f"{what}: relative error {error:.1e}"


def assert_parity(
    shards: list[Shard],
    alpha: float,
    actual: tuple[Tensor, list[Any], Any],
    expected: tuple[Tensor, list[Tensor | None]],
    tolerance: float,
) -> None:
    """Compare loss and gradients."""
    assert_close(actual[0], expected[0], tolerance, "loss")
    norm = max([float(v.norm(dim=1).max()) for s in shards for v in (s.U, s.W) if len(v)], default=1.0)
    terms = {"U": alpha * norm, "W": alpha * norm, "alpha": norm**2, "beta": 1.0}
    for (name, term), value, right in zip(terms.items(), actual[1], expected[1], strict=True):
        if right is not None:
            assert_close(value, right, tolerance, name, term)


def check_fps(
    pools: dict[int, Pool], loss: Loss, shards: list[Shard], alpha: float, tolerance: float = 1e-10, **arguments: Any
) -> None:
    """Compare a loss that has the signature of fps_loss to the reference."""
    expected = reference.fps(shards, alpha, arguments.get("direction", "q2d"))
    assert_parity(shards, alpha, run(pools, loss, shards, alpha, **arguments), expected, tolerance)
