"""What a step sends: one gather of W, one reduction of dW, and O(N) for ids, biases and column statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigdssm.losses import fps_loss

from .spawn import Pool

M, D = 256, 48


def count(
    rank: int, world_size: int, options: dict[str, Any], use_ids: bool, norm: float = 1.0
) -> list[tuple[str, int]]:
    """Return (collective, bytes of the result on a rank) for every collective of a step."""
    sent: list[tuple[str, int]] = []
    names = ("all_gather", "all_reduce", "reduce_scatter_single", "reduce_scatter_tensor", "reduce_scatter",
             "all_gather_into_tensor", "all_gather_single", "broadcast", "all_to_all", "gather", "scatter",
             "all_gather_object", "send", "isend", "reduce")  # fmt: skip
    import bigdssm.distributed as ours

    def spy(name: str, function: Any) -> Any:
        def counting(first: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = first if isinstance(first, list) else [first]
            if name.startswith("reduce_scatter"):
                tensors = [args[0]]
            sent.append((name, sum(t.numel() * t.element_size() for t in tensors)))
            return function(first, *args, **kwargs)

        return counting

    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    scatter = ours._reduce_scatter
    generator = torch.Generator().manual_seed(rank)
    U, W = (
        (norm * torch.nn.functional.normalize(torch.randn(M, D, generator=generator))).requires_grad_() for _ in "UW"
    )
    ids = {"query_ids": torch.arange(M), "doc_ids": torch.arange(M) + 7 * rank} if use_ids else {}
    try:
        for name, function in originals.items():
            setattr(dist, name, spy(name, function))
        ours._reduce_scatter = spy("reduce_scatter_single", scatter)
        fps_loss(U, W, alpha=2.0, beta=torch.zeros(M) if use_ids else None, **ids, **options).loss.backward()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
        ours._reduce_scatter = scatter
    return sent


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize("use_ids", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_per_step(pools: dict[int, Pool], world_size: int, direction: str, use_ids: bool) -> None:
    N = world_size * M
    matrix = N * D * 4
    for sent in pools[world_size].run(count, {"direction": direction, "tile": 16}, use_ids):
        assert [s for s in sent if s[1] >= matrix] == [("all_gather", matrix), ("reduce_scatter_single", matrix)]
        vectors = [size for _, size in sent if 1024 < size < matrix]
        # ids and biases: doc ids, beta, and (query id, column) of each query; columns: sums of exponentials and weights
        budget = (8 + 8 + 16) * N * use_ids + (0 if direction == "q2d" else (8 + 8) * N + 8)
        assert sum(vectors) == budget
        assert sum(size for _, size in sent if size <= 1024) <= 1024
        assert len(sent) <= 10


def test_scores_of_any_range_cost_two_more_vectors(pools: dict[int, Pool]) -> None:
    """One shift cannot serve scores from -1800 to 1800: the columns' largest scores and sums are reduced instead."""
    options = {"direction": "both", "tile": 16}
    small, wide = (pools[2].run(count, options, False, norm)[0] for norm in (1.0, 30.0))
    assert sum(size for _, size in wide) == sum(size for _, size in small) + 2 * 8 * 2 * M


def test_nothing_is_sent_on_one_rank() -> None:
    assert count(0, 1, {"direction": "both"}, True) == []
