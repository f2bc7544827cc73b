"""Reads and communication of the losses, counted on a simulated device; results are the same there."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdssm.losses import PairCE, Softmax, fps_loss, ranking_loss
from bigdssm.losses.kernels.columns import strip_rows
from tests import simgpu
from tests.distributed.reference import Shard, make_shards

OPTIONS = frozenset({"beta", "neg_bias", "weight", "query_ids", "doc_ids", "shared", "known", "negatives"})
DIRECTIONS = ["q2d", "d2q", "both"]
BF16 = torch.bfloat16
# launches of a whole loss but those of its strips, and of a strip
FIXED = {"q2d": 370, "d2q": 400, "both": 420}
EACH = {"q2d": 70, "d2q": 90, "both": 100}
LOSSES = {
    **{direction: partial(fps_loss, direction=direction) for direction in DIRECTIONS},
    **{loss.name: partial(ranking_loss, loss, in_batch=True) for loss in (Softmax(), PairCE())},
}  # fmt: skip


def step(loss: Any, shard: Shard, put: Any = lambda tensor: tensor) -> list[Tensor | None]:
    """Return the loss and the gradients of U, W, alpha, beta."""
    x = Shard(**{f.name: None if (v := getattr(shard, f.name)) is None else put(v) for f in fields(Shard)})
    alpha = put(torch.tensor(20.0))
    leaves = [t for t in (x.U, x.W, alpha, x.beta) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    out = loss(x.U, x.W, x.positive, alpha=alpha, **x.arguments())
    out.loss.backward()
    return [out.loss.detach(), *(leaf.grad for leaf in leaves), *out.stats.values()]


def batch(m: int, D: int, known_each: int, num_docs: int, dtype: torch.dtype = BF16, seed: int = 0) -> Shard:
    """Return a batch with ids and biases, and `known_each` known documents per query."""
    generator = torch.Generator().manual_seed(seed)
    options = frozenset({"beta", "neg_bias", "query_ids", "doc_ids"})
    (shard,) = make_shards(generator, [(m, m)], D, num_docs=num_docs, options=options, dtype=dtype)
    assert shard.query_ids is not None
    queries = shard.query_ids.repeat_interleave(known_each)
    docs = torch.randint(num_docs, queries.shape, generator=generator) + 2**61
    return replace(shard, known=torch.stack([queries, docs], 1)) if known_each else shard


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("world_size", "dtype", "tolerance"), [(1, BF16, 2**-7), (3, torch.float64, 1e-10)])
def test_device_results_equal_cpu_results(loss: str, world_size: int, dtype: torch.dtype, tolerance: float) -> None:
    """With every option, some queries of weight 0, and strips of few rows; gradients are rounded to their dtype."""
    options = OPTIONS if loss in ("softmax", "pair_ce") else OPTIONS - {"negatives"}
    for num_docs, query_ids, times in ((50, True, False), (300, True, False), (50, False, True)):
        given = options - (set() if query_ids else {"query_ids"}) | ({"times"} if times else set())
        (shard,) = make_shards(
            torch.Generator().manual_seed(3), [(50, 60)], 8, num_queries=25, num_docs=num_docs, options=given,
            dtype=dtype,
        )  # fmt: skip
        with simgpu.ranks(world_size) if world_size > 1 else nullcontext():
            expected = step(LOSSES[loss], shard)
            with simgpu.Device(memory=32 * 20 * 60 * world_size * 8) as device:
                found = [None if x is None else x.elem for x in step(LOSSES[loss], shard, device.put)]  # type: ignore[attr-defined]
        assert not device.mixed
        for a, b in zip(found, expected, strict=True):
            assert a is not None and b is not None and a.dtype == b.dtype
            scale = max(float(b.double().abs().max()), 1e-3)
            assert float((a.double() - b.double()).abs().max()) <= tolerance * scale


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("known_each", "num_docs"), [(0, 10**6), (50, 10**6), (50, 400)])
@pytest.mark.parametrize(("world_size", "m"), [(8, 128), (512, 4)])
def test_operations_of_a_pretraining_loss(
    world_size: int, m: int, known_each: int, direction: str, num_docs: int
) -> None:
    """Few pairs (sparse mask), or many (dense mask)."""
    D, N = 16, world_size * m
    shard = batch(m, D, known_each, num_docs)
    with simgpu.ranks(world_size), simgpu.Device() as device:
        step(LOSSES[direction], shard, device.put)
    assert not device.mixed and not device.uploads
    # sizes of the ranks, pairs of this rank's queries, and the numbers of masked entries of all strips
    most = (5 if known_each else 3) + (direction != "q2d")
    assert sum(device.waits.values()) <= most, device.waits
    assert device.launches <= FIXED[direction] + EACH[direction], device.operations
    assert {backend for _, backend, _ in device.collectives} == {"nccl"}
    names = Counter(name for name, _, _ in device.collectives)
    columns = direction != "q2d"
    assert names == {"all_gather": 2 + columns, "all_reduce": 2 + columns, "reduce_scatter": 2}
    # per column: vector, id, biases and its share of all pairs; gradients of vector and beta; sums of the column
    row = 2 * D + 8 + 2 * 4 + 16 * (1 + known_each)
    numbers = 23 * 8 * world_size + 6 * 8 + 2 * 8
    expected = N * (row + 4 * D + 8 + columns * 2 * 8) + columns * 8 + numbers
    assert sum(size for _, _, size in device.collectives) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "m", "D", "biases"),
    [
        (8, 64, 256, ("beta", "neg_bias")),
        (8, 64, 64, ("neg_bias",)),
        (512, 2, 256, ("beta",)),
        (512, 2, 64, ("beta", "neg_bias")),
        (512, 2, 64, ()),
    ],
)
def test_only_required_tensors_are_sent(world_size: int, m: int, D: int, biases: tuple[str, ...]) -> None:
    """Per column its vector, id, biases and pair; the gradients of its vector and beta; and the sizes of ranks."""
    kept = ("U", "W", "positive", "weight", "query_ids", "doc_ids", *biases)
    given = batch(m, D, 0, 10**6)
    shard = replace(given, **{name: None for name in ("beta", "neg_bias") if name not in kept})
    with simgpu.ranks(world_size), simgpu.Device() as device:
        step(LOSSES["q2d"], shard, device.put)
    assert sum(name == "all_gather" for name, _, _ in device.collectives) == 2
    sent = sum(size for _, _, size in device.collectives) - 23 * 8 * world_size - 8 * 8
    column = 2 * D + 8 + 16 + 4 * len(biases) + 4 * D + 8 * ("beta" in biases)
    # a packed row is a multiple of 16 bytes, as products require: 4 or 8 bytes are padding with one bias or none
    assert sent == world_size * m * (column + (8, 4, 0)[len(biases)])
    assert sent <= (1.01 if biases or D > 128 else 1.02) * world_size * m * column


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_launches_grow_with_strips_alone(direction: str) -> None:
    launches = []
    for rows in (512, 128):
        with simgpu.ranks(4), simgpu.Device(memory=32 * rows * 2048 * (6 if direction == "q2d" else 10)) as device:
            step(LOSSES[direction], batch(512, 8, 0, 10**6), device.put)
        launches.append(device.launches)
    assert launches[0] <= FIXED[direction] + EACH[direction]
    assert 0 < launches[1] - launches[0] <= 3 * EACH[direction]


def test_launches_of_large_batches() -> None:
    """65,536 rows on 8 devices, 1,048,576 on 512, by number of strips."""
    with simgpu.Device():
        for m, world_size, most in ((8192, 8, 600), (2048, 512, 2500)):
            strips = -(-m // strip_rows(simgpu.PLACE, m * world_size, 6))
            assert FIXED["q2d"] + strips * EACH["q2d"] <= most


@pytest.mark.parametrize("name", ["softmax", "pair_ce"])
def test_operations_of_a_fine_tuning_loss(name: str) -> None:
    """With candidates and in-batch negatives: the number of columns is one more synchronization."""
    shard = replace(batch(128, 16, 3, 10**6), negatives=torch.arange(256).view(128, 2) % 128)
    with simgpu.ranks(8), simgpu.Device() as device:
        step(LOSSES[name], shard, device.put)
    assert not device.mixed and not device.uploads
    assert sum(device.waits.values()) <= 6, device.waits
    assert sum(name == "all_gather" for name, _, _ in device.collectives) == 2


def test_operations_of_a_device_are_counted() -> None:
    """The counter itself, on operations that it must count."""
    with simgpu.Device() as device:
        x = device.put(torch.arange(4.0))
        device.reset()
        float(x.sum()), (x > 1).nonzero(), x[x > 1], x.cpu()
        assert sum(device.waits.values()) == 4
        torch.tensor([1.0], device=simgpu.PLACE), torch.ones(2).to(x.device), x.new_tensor([1.0])
        assert sum(device.uploads.values()) == 3
        torch.ones(2).pin_memory().to(x.device)
        assert sum(device.uploads.values()) == 3
        _ = x + torch.ones(4)
        assert sum(device.mixed.values()) == 1
        device.reset()
        torch.mm(x.view(2, 2).to(BF16), x.view(2, 2).to(BF16), out_dtype=torch.float32).add_(1)
        assert device.launches == 4
