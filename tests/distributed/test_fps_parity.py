"""fps_loss on 1, 2 and 3 ranks equals the dense loss of the concatenated batch: value and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bigdssm.losses import fps_loss

from . import reference
from .parity import assert_close, check_fps, run, with_dense_mask
from .reference import DOUBLE, Shard, make_shards
from .spawn import Pool

OPTIONS = ("beta", "neg_bias", "weight", "query_ids", "doc_ids", "shared", "known", "is_known", "times")


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Shard], float, dict[str, Any]]:
    ranks = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=ranks, max_size=ranks))
    shards = make_shards(
        torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        sizes,
        D=draw(st.sampled_from([1, 3, 8])),
        norm=draw(st.sampled_from([1.0, 1.0, 5.0])),
        num_queries=draw(st.sampled_from([None, 3, 8])),
        num_docs=draw(st.sampled_from([None, 4, 12])),
        options=frozenset(draw(st.sets(st.sampled_from(OPTIONS)))),
    )
    arguments = {
        "direction": draw(st.sampled_from(["q2d", "d2q", "both"])),
        "tile": draw(st.sampled_from([None, 1, 2, 3, 5])),
    }
    return shards, draw(st.sampled_from([0.5, 5.0, 20.0, 100.0])), arguments


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(batch=batches(), loss=st.sampled_from([fps_loss, partial(with_dense_mask, fps_loss)]))
def test_equals_dense_reference(
    pools: dict[int, Pool], batch: tuple[list[Shard], float, dict[str, Any]], loss: Callable[..., Any]
) -> None:
    shards, alpha, arguments = batch
    check_fps(pools, loss, shards, alpha, **arguments)


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_a_query_without_negatives_whose_positive_scores_low(
    pools: dict[int, Pool], direction: str, dtype: torch.dtype
) -> None:
    """All other documents appear after its time: its loss and gradients are 0 for any score of its positive."""
    U = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=dtype)
    W = torch.tensor([[-9.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    time, since = torch.tensor([0.5, 2.0, 2.0], dtype=DOUBLE), torch.tensor([0.0, 1.0, 1.0], dtype=DOUBLE)
    shard = Shard(U, W, torch.arange(3), query_ids=torch.arange(3), doc_ids=torch.arange(3), time=time, since=since)
    tolerance = {DOUBLE: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-3}[dtype]
    check_fps(pools, fps_loss, [shard], 100.0, tolerance=tolerance, direction=direction)


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_one_rank_empty(pools: dict[int, Pool], direction: str, empty: int) -> None:
    sizes = [(4, 6), (3, 3), (5, 9)]
    sizes[empty] = (0, 0)
    shards = make_shards(
        torch.Generator().manual_seed(empty), sizes, 4, num_queries=4, num_docs=6, options=frozenset(OPTIONS)
    )
    check_fps(pools, fps_loss, shards, 20.0, direction=direction, tile=4)


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
def test_merged_duplicates_equal_masked_duplicates(pools: dict[int, Pool], direction: str) -> None:
    """A document encoded once with neg_bias = log(count) equals `count` columns; each row drops its positive's."""
    generator = torch.Generator().manual_seed(5)
    D, docs, rows = 6, 5, 14
    table = torch.randn(docs, D, generator=generator, dtype=DOUBLE)
    column = torch.cat([torch.arange(docs), torch.randint(docs, (rows - docs,), generator=generator)])
    U = torch.randn(rows, D, generator=generator, dtype=DOUBLE)
    copies = [
        Shard(U[a:b], table[column[a:b]], torch.arange(b - a), doc_ids=column[a:b]) for a, b in ((0, 6), (6, rows))
    ]
    count = torch.bincount(column, minlength=docs).double().log()
    merged = [
        Shard(U, table, column, neg_bias=count, doc_ids=torch.arange(docs)),
        Shard(U[:0], table[:0], column[:0], neg_bias=count[:0], doc_ids=column[:0]),
    ]
    loss, grads, _ = run(pools, fps_loss, copies, 3.0, direction=direction)
    merged_loss, merged_grads, _ = run(pools, fps_loss, merged, 3.0, direction=direction)
    assert_close(merged_loss, loss, 1e-12, "loss")
    assert_close(merged_grads[0], grads[0], 1e-12, "U")
    summed = torch.zeros(docs, D, dtype=DOUBLE).index_add_(0, column, grads[1])
    assert_close(merged_grads[1], summed, 1e-12, "W")


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [20.0, 100.0])
def test_lower_precision(pools: dict[int, Pool], direction: str, dtype: torch.dtype, alpha: float) -> None:
    """With equal rounded inputs; bfloat16 gradients are rounded once, to 8 bits."""
    generator = torch.Generator().manual_seed(1)
    options = frozenset({"beta", "neg_bias", "query_ids", "doc_ids", "weight"})
    shards = make_shards(generator, [(40, 60), (37, 37)], 32, num_queries=30, num_docs=50, options=options, dtype=dtype)
    check_fps(
        pools, fps_loss, shards, alpha, tolerance=1e-4 if dtype == torch.float32 else 5e-3, direction=direction, tile=16
    )


@pytest.mark.parametrize("direction", ["q2d", "both"])
def test_within_a_group_of_some_ranks(pools: dict[int, Pool], direction: str) -> None:
    """Ranks 0 and 2 have one batch, rank 1 another, at the same time."""
    options = frozenset({"beta", "query_ids", "doc_ids", "weight"})
    generator = torch.Generator().manual_seed(8)
    shards = make_shards(generator, [(4, 6), (5, 5), (3, 7)], 4, num_queries=5, num_docs=6, options=options)
    results = pools[3].run(in_a_group, shards, direction)
    for members in ([0, 2], [1]):
        loss, leaves = reference.fps([shards[k] for k in members], 5.0, direction)
        found = [results[k] for k in members]
        for value, _ in found:
            assert_close(value, loss, 1e-10, "loss")
        for at in (0, 1):
            right = leaves[at]
            assert right is not None
            assert_close(torch.cat([grads[at] for _, grads in found]) / len(members), right, 1e-10, "UW"[at])


def in_a_group(rank: int, world_size: int, shards: list[Shard], direction: str) -> Any:
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    shard = shards[rank]
    U, W = shard.U.clone().requires_grad_(), shard.W.clone().requires_grad_()
    arguments: dict[str, Any] = {**shard.arguments(), "direction": direction, "tile": 4}
    out = fps_loss(U, W, shard.positive, alpha=5.0, group=groups[rank % 2], **arguments)
    out.loss.backward()
    return out.loss.detach(), [U.grad, W.grad]


def test_statistics(pools: dict[int, Pool]) -> None:
    """Counted by hand: three queries, five columns, one duplicate of a positive."""
    eye = torch.eye(3, dtype=DOUBLE)
    first = Shard(eye[:2], eye[[0, 2]], torch.arange(2), doc_ids=torch.tensor([7, 8]))
    second = Shard(eye[2:], eye[[2, 1, 0]], torch.tensor([0]), doc_ids=torch.tensor([9, 6, 7]))
    _, _, stats = run(pools, fps_loss, [first, second], 2.0)
    # query 0 drops the other column of document 7; query 1's positive is not its best column
    assert float(stats["dropped_fraction"]) == 1 / 12
    assert float(stats["effective_negatives"]) == 11 / 3
    # query 2's positive has an equal among its negatives: not above it
    assert float(stats["in_batch_accuracy"]) == pytest.approx(1 / 3)
    by_hand = [torch.tensor(row, dtype=DOUBLE).logsumexp(0) for row in ([2, 0, 0, 0], [0, 0, 2, 0, 0], [2, 2, 0, 0, 0])]
    assert float(stats["lse_min"]) == pytest.approx(float(min(by_hand)))
    assert float(stats["lse_max"]) == pytest.approx(float(max(by_hand)))


def test_no_gradient_required(pools: dict[int, Pool]) -> None:
    shards = make_shards(torch.Generator().manual_seed(2), [(4, 6)], 5)
    out = fps_loss(shards[0].U, shards[0].W, alpha=3.0, direction="both")
    assert not out.loss.requires_grad
    assert_close(out.loss, reference.fps(shards, 3.0, "both")[0], 1e-10, "loss")


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize("argument", ["U", "W", "alpha", "beta"])
def test_only_one_gradient_required(argument: str, direction: str) -> None:
    shard = make_shards(torch.Generator().manual_seed(2), [(4, 6)], 5, options=frozenset({"beta"}))[0]
    right = dict(zip(["U", "W", "alpha", "beta"], reference.fps([shard], 3.0, direction)[1], strict=True))[argument]
    given = {"U": shard.U, "W": shard.W, "alpha": torch.tensor(3.0, dtype=DOUBLE), "beta": shard.beta}
    leaf = given[argument]
    assert leaf is not None and right is not None
    leaf.requires_grad_()
    (found,) = torch.autograd.grad(fps_loss(**given, direction=direction).loss, leaf)  # type: ignore[arg-type]
    assert found.shape == leaf.shape
    assert_close(found, right.view(leaf.shape), 1e-10, argument, 1.0)


def test_known_pairs_change_the_loss() -> None:
    shard = make_shards(
        torch.Generator().manual_seed(3),
        [(4, 6)],
        5,
        num_queries=4,
        num_docs=5,
        options=frozenset({"query_ids", "doc_ids"}),
    )[0]
    assert shard.query_ids is not None and shard.doc_ids is not None
    plain = fps_loss(shard.U, shard.W, alpha=3.0, **shard.arguments()).loss
    pairs = torch.stack([shard.query_ids[:1].expand(6), shard.doc_ids], 1)
    added = fps_loss(shard.U, shard.W, alpha=3.0, **replace(shard, known=pairs).arguments()).loss
    assert added < plain
