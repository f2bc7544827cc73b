"""On a CUDA device the losses take the same path with larger tiles, and equal the same dense reference.

It needs torch, NumPy and Triton; towers, batches and a run are in test_gpu_models.py.
"""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor

from bigdssm.config import LossConfig
from bigdssm.losses import PairCE, Softmax, Triplet, fps_loss, ranking_loss

from . import reference
from .interpreted import fused_fps
from .parity import Loss, assert_parity, run_rank, with_dense_mask
from .reference import Shard, make_shards

DEVICE = "cuda"
TILE = 8192
OPTIONS = frozenset({"beta", "neg_bias", "weight", "query_ids", "doc_ids", "shared", "known"})

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 5e-3)]


def batch(dtype: torch.dtype, *more: str) -> Shard:
    generator = torch.Generator().manual_seed(1)
    options = OPTIONS | set(more)
    return make_shards(generator, [(40, 60)], 32, num_queries=30, num_docs=50, options=options, dtype=dtype)[0]


def check(loss: Loss, shard: Shard, expected: tuple[Tensor, list[Tensor | None]], tolerance: float) -> None:
    given = {field.name: getattr(shard, field.name) for field in fields(Shard)}
    there = Shard(**{name: None if value is None else value.to(DEVICE) for name, value in given.items()})
    value, gradients, _ = run_rank(0, 1, loss, [there], 20.0, {"tile": TILE})
    assert value.device.type == DEVICE
    back = [None if gradient is None else gradient.cpu() for gradient in gradients]
    assert_parity([shard], 20.0, (value.cpu(), back, None), expected, tolerance)


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_fps(direction: str, dtype: torch.dtype, tolerance: float) -> None:
    shard = batch(dtype)
    check(partial(fps_loss, direction=direction), shard, reference.fps([shard], 20.0, direction), tolerance)


@pytest.mark.parametrize("loss", [fused_fps, partial(with_dense_mask, fused_fps)], ids=["pairs", "matrix"])
@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize(
    ("dtype", "D", "tolerance"),
    [(torch.float32, 64, 1e-4), (torch.bfloat16, 64, 5e-3), (torch.bfloat16, 100, 5e-3), (torch.bfloat16, 256, 5e-3)],
)
def test_fps_by_kernels(dtype: torch.dtype, D: int, tolerance: float, direction: str, loss: Loss) -> None:
    """More than one block each way, none of them full; −inf for the first blocks of columns."""
    generator = torch.Generator().manual_seed(1)
    shard = make_shards(generator, [(300, 700)], D, num_queries=90, num_docs=400, options=OPTIONS, dtype=dtype)[0]
    assert shard.neg_bias is not None
    shard.neg_bias[:200] = -math.inf
    expected = reference.fps([shard], 20.0, direction)
    check(partial(loss, direction=direction), shard, expected, tolerance)


@pytest.mark.parametrize("direction", ["q2d", "both"])
def test_kernels_give_the_same_bits_again(direction: str) -> None:
    U, W = (torch.nn.functional.normalize(torch.randn(3000, 128, device=DEVICE)).bfloat16() for _ in "UW")
    found = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (U, W)]
        loss = fused_fps(*leaves, alpha=20.0, direction=direction).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("loss", [Softmax(), PairCE(), Triplet()], ids=lambda loss: loss.name)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_ranking(loss: LossConfig, dtype: torch.dtype, tolerance: float) -> None:
    shard = batch(dtype, "negatives")
    check(partial(ranking_loss, loss, in_batch=True), shard, reference.ranking(loss, [shard], 20.0, True), tolerance)


@pytest.mark.parametrize("direction", ["q2d", "both"])
def test_a_large_batch_in_bfloat16(direction: str) -> None:
    """65,536 rows: dense scores would be 17 GB in float32, and their gradients as much again."""
    m = 65_536 if DEVICE == "cuda" else 2048
    U, W = (torch.nn.functional.normalize(torch.randn(m, 128, device=DEVICE)).bfloat16() for _ in "UW")
    U.requires_grad_(), W.requires_grad_()
    out = fps_loss(U, W, alpha=20.0, direction=direction, tile=TILE)  # type: ignore[arg-type]
    out.loss.backward()
    assert U.grad is not None and U.grad.isfinite().all()
    expected = math.log(m) + 20.0**2 / (2 * 128)  # the scores of random directions are normal
    assert float(out.loss.detach()) == pytest.approx(expected, rel=0.02)
    if DEVICE == "cuda":
        assert torch.cuda.max_memory_allocated() < 4e9
