"""The softmax losses by Triton kernels equal the dense reference: values and gradients, in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdssm.losses import fps_loss
from tests.unit.losses.numerics import NarrowProducts, unit

from . import reference
from .conftest import Pools
from .interpreted import ENVIRONMENT, fused_fps, fused_fps_of_packed, fused_on_rank_0
from .parity import assert_close, assert_parity, mean_over_ranks, run_rank, with_dense_mask
from .reference import DOUBLE, Shard, make_shards
from .spawn import RankFailed

DIRECTIONS = ("q2d", "d2q", "both")
OPTIONS = frozenset({"beta", "neg_bias", "weight", "query_ids", "doc_ids", "shared", "known"})
PRECISIONS = [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pools]:
    pytest.importorskip("triton")
    made = Pools(ENVIRONMENT)
    yield made
    made.close()


def check(
    ranks: Pools,
    shards: list[Shard],
    alpha: float,
    direction: str,
    tolerance: float,
    loss: Callable[..., Any] = fused_fps,
) -> dict[str, Tensor]:
    """Compare loss and gradients with the reference; return the statistics."""
    found = mean_over_ranks(ranks[len(shards)].run(run_rank, loss, shards, alpha, {"direction": direction}))
    assert_parity(shards, alpha, found, reference.fps(shards, alpha, direction), tolerance)
    return found[2]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (fused_fps, OPTIONS),
        (partial(with_dense_mask, fused_fps_of_packed), OPTIONS),
        (fused_fps, OPTIONS | {"times"}),
    ],
    ids=["pairs", "matrix and W as it is sent", "times"],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_equals_the_dense_reference(
    ranks: Pools, dtype: torch.dtype, tolerance: float, direction: str, loss: Callable[..., Any],
    options: frozenset[str],
) -> None:  # fmt: skip
    """Several blocks in each direction, none of them full, and a vector size that is not a power of 2."""
    generator = torch.Generator().manual_seed(1)
    shards = make_shards(
        generator, [(140, 270)], 24, num_queries=60, num_docs=150, options=options, dtype=dtype
    )  # fmt: skip
    found = check(ranks, shards, 20.0, direction, tolerance, loss)
    plain = run_rank(0, 1, fps_loss, shards, 20.0, {"direction": direction})[2]
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {k: float(v) for k, v in plain.items()}, rel=max(1e-4, tolerance / 10)
    )  # oneDNN rounds products of bfloat16 otherwise than Triton's interpreter


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", [[(70, 90), (0, 0)], [(1, 1), (0, 200)]])
def test_ranks_of_any_size(ranks: Pools, sizes: list[tuple[int, int]], direction: str) -> None:
    """Ranks with fewer columns leave some unused; some have no query, or no column either."""
    generator = torch.Generator().manual_seed(2)
    shards = make_shards(
        generator, sizes, 16, num_queries=30, num_docs=60, options=OPTIONS - {"weight"}, dtype=torch.float32
    )
    check(ranks, shards, 20.0, direction, 1e-4)


Backend = Callable[[Shard, float, str], Any]  # loss, gradients of U, W, alpha, beta, and statistics of one rank


def by_torch(shard: Shard, alpha: float, direction: str) -> Any:
    return run_rank(0, 1, partial(fps_loss, tile=16), [shard], alpha, {"direction": direction})


def by_narrow_products(shard: Shard, alpha: float, direction: str) -> Any:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with NarrowProducts() as products:
        found = by_torch(shard, alpha, direction)
    assert products.narrowed > 50 and torch.backends.mkldnn.matmul.fp32_precision == before
    return found


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "narrow products":
        return by_narrow_products
    if request.param == "torch":
        return by_torch
    pool = request.getfixturevalue("ranks")[1]
    return lambda shard, alpha, direction: pool.run(run_rank, fused_fps, [shard], alpha, {"direction": direction})[0]


SCORES = {
    "alpha at its clamp": (unit(40, 8, 1), unit(40, 8, 2), 100.0),
    "alpha above it": (unit(40, 8, 1), unit(40, 8, 2), 400.0),
    "aligned vectors": (unit(40, 8, 1), unit(40, 8, 1), 100.0),
    "all vectors equal": (unit(1, 8, 1).expand(40, 8), unit(1, 8, 1).expand(40, 8), 100.0),
    "opposed vectors": (unit(1, 8, 1).expand(40, 8), -unit(1, 8, 1).expand(40, 8), 100.0),
    "norm 30": (30 * unit(40, 8, 1), 30 * unit(40, 8, 2), 1.0),
    "norm 30, two clusters": (30 * unit(40, 1, 1), 30 * unit(40, 1, 2), 1.0),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", DOUBLE, 1e-10), ("torch", torch.float32, 2e-4), ("triton", torch.float32, 2e-4)],
    indirect=["backend"],
)
def test_extreme_scores(backend: Backend, case: str, direction: str, dtype: torch.dtype, tolerance: float) -> None:
    U, W, alpha = SCORES[case]
    shard = Shard(U.to(dtype), W.to(dtype), torch.arange(len(U)))
    found, expected = backend(shard, alpha, direction), reference.fps([shard], alpha, direction)
    if case == "opposed vectors":  # the terms of alpha's gradient cancel
        found[1][2] = expected[1][2]
    assert_close(found[0], expected[0], tolerance, "loss", term=0.1)
    assert_parity([shard], alpha, found, expected, tolerance)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha", [20.0, 100.0])
@pytest.mark.parametrize("backend", ["torch", "narrow products", "triton"], indirect=True)
def test_bfloat16_is_as_good_as_its_inputs(backend: Backend, direction: str, alpha: float) -> None:
    """Scores are never rounded to bfloat16, which would change dU by 12 % at alpha = 100."""
    U = unit(300, 64, 3)
    W = torch.nn.functional.normalize(U + 3 * unit(300, 64, 4), dim=1)
    shard = Shard(U.bfloat16(), W.bfloat16(), torch.arange(300))
    value, gradients, _ = backend(shard, alpha, direction)
    loss, right = reference.fps([shard], alpha, direction)
    for a, b in zip((value, *gradients[:2]), (loss, *right[:2]), strict=True):
        assert b is not None and float((a.double() - b).norm() / b.norm()) <= 5e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_columns_that_are_no_querys_negative(ranks: Pools, direction: str) -> None:
    """−inf for the whole first block of columns: the maximum of a row is −inf until the next block."""
    shards = make_shards(torch.Generator().manual_seed(4), [(50, 100)], 8, options=OPTIONS, dtype=torch.float32)
    neg_bias = torch.zeros(100, dtype=torch.float64)
    neg_bias[:64] = -math.inf
    check(ranks, [replace(shards[0], neg_bias=neg_bias)], 20.0, direction, 1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_left(backend: Backend, direction: str) -> None:
    """One document in all columns, weights of 0, and empty input: loss 0, gradients 0."""
    one = torch.zeros(6, dtype=torch.int64)
    U, W = unit(6, 4, 1).float(), unit(6, 4, 2).float()
    shards = [
        Shard(U, W, torch.arange(6), query_ids=one, doc_ids=one),
        Shard(U, W, torch.arange(6), weight=torch.zeros(6)),
        Shard(U[:0], W[:0], one[:0]),
    ]
    for shard in shards:
        value, gradients, _ = backend(shard, 20.0, direction)
        assert float(value) == 0.0
        assert not any(bool(gradient.any()) for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_vectors_give_a_non_finite_loss(backend: Backend, direction: str, bad: float) -> None:
    """The trainer skips such a step: it must detect it, and nothing may raise or hang."""
    U = unit(6, 4, 1).float()
    U[2, 1] = bad
    shard = Shard(U, unit(6, 4, 2).float(), torch.arange(6))
    assert not backend(shard, 20.0, direction)[0].isfinite()


@pytest.mark.slow
def test_ranks_agree_on_the_kernels(ranks: Pools) -> None:
    """Their sums are reduced by other collectives than on the plain path."""
    shards = [Shard(unit(6, 4, k).float(), unit(6, 4, 9 + k).float(), torch.arange(6)) for k in range(2)]
    with pytest.raises(RankFailed, match="rank 0 has fps over all columns, both, by Triton kernels; rank 1 has"):
        ranks[2].run(run_rank, fused_on_rank_0, shards, 20.0, {"direction": "both"})
