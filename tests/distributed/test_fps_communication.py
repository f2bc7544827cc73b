"""Communication of a step: sizes, one gather of W with ids and biases, one reduction of dW, O(N) for column sums."""

from __future__ import annotations

import gc
from pathlib import Path
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
        # with W: doc ids, beta, (query id, document id) of each query, and 4 bytes of padding to a multiple of 16
        gathered = matrix + (8 + 4 + 16 + 4) * N * use_ids
        large = [("all_gather_into_tensor", gathered), ("reduce_scatter_single", matrix)]
        assert [s for s in sent if s[1] >= matrix] == large
        vectors = [size for _, size in sent if 1024 < size < matrix]
        # sums of exponentials and weights of columns
        assert sum(vectors) == (0 if direction == "q2d" else (8 + 8) * N + 8)
        assert sum(size for _, size in sent if size <= 1024) <= 1024
        assert len(sent) == (5 if direction == "q2d" else 7)
        assert sum(name.startswith("all_gather") for name, _ in sent) == (2 if direction == "q2d" else 3)


def test_scores_of_any_range_cost_two_more_vectors(pools: dict[int, Pool]) -> None:
    """No single shift fits scores from -1800 to 1800: maxima and sums of columns are reduced instead."""
    options = {"direction": "both", "tile": 16}
    small, wide = (pools[2].run(count, options, False, norm)[0] for norm in (1.0, 30.0))
    assert sum(size for _, size in wide) == sum(size for _, size in small) + 2 * 8 * 2 * M


def trace(rank: int, world_size: int, direction: str) -> list[str]:
    """Return the events of a forward in order: gathers, the positives' scores, the wait for W, tiles."""
    import bigdssm.distributed as ours
    from bigdssm.losses import contrastive
    from bigdssm.losses.kernels.torch_passes import ScoreMatrix

    events: list[str] = []
    originals = dist.all_gather_into_tensor, ours.PackedRows.wait, contrastive._positive_scores, ScoreMatrix.scores

    def noted(name: str, function: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            events.append(f"start {name}" if kwargs.get("async_op") else name)
            return function(*args, **kwargs)

        return noting

    named = zip(("gather", "wait", "positives", "tile"), originals, strict=True)
    spies = [noted(name, function) for name, function in named]
    dist.all_gather_into_tensor, ours.PackedRows.wait, contrastive._positive_scores, ScoreMatrix.scores = spies
    try:
        W = torch.nn.functional.normalize(torch.randn(M, D, generator=torch.Generator().manual_seed(rank)))
        fps_loss(W, W, alpha=2.0, beta=torch.zeros(M), query_ids=torch.arange(M), doc_ids=torch.arange(M),
                 direction=direction, tile=M // 2)  # type: ignore[arg-type]  # fmt: skip
    finally:
        dist.all_gather_into_tensor, ours.PackedRows.wait, contrastive._positive_scores, ScoreMatrix.scores = originals
    return events


@pytest.mark.parametrize("direction", ["q2d", "both"])
def test_the_gather_of_W_overlaps_the_positives(pools: dict[int, Pool], direction: str) -> None:
    """The gather of sizes completes before the gather of W starts."""
    for events in pools[3].run(trace, direction):
        assert events[:5] == ["gather", "start gather", "positives", "wait", "tile"]


def peak_growth_mb(rank: int, world_size: int, m: int, direction: str, popular: bool) -> float:
    """Return the growth of the peak resident size in a forward and backward, in MB."""
    generator = torch.Generator().manual_seed(rank)
    U, W = (torch.nn.functional.normalize(torch.randn(m, 8, generator=generator)).requires_grad_() for _ in "UW")
    doc_ids = torch.arange(m) + m * rank
    doc_ids[:: 2 if popular else m] = -1  # one document in half of all rows, or in one row of each rank
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    base = status_mb("VmRSS")
    query_ids = torch.arange(m) + m * rank
    fps_loss(U, W, alpha=5.0, query_ids=query_ids, doc_ids=doc_ids, direction=direction).loss.backward()  # type: ignore[arg-type]
    return status_mb("VmHWM") - base


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("popular", [False, True])
@pytest.mark.parametrize("direction", ["q2d", "both"])
def test_memory_does_not_grow_with_the_score_matrix(pools: dict[int, Pool], direction: str, popular: bool) -> None:
    """Only a few tiles or strips of a rank's scores exist at once.

    A rank has 4,096 x 8,192 scores: 134 MB in float32, 34 MB as one byte.
    """
    pools[2].run(peak_growth_mb, 1024, direction, popular)  # one-time allocations
    for growth in pools[2].run(peak_growth_mb, 4096, direction, popular):
        assert growth < 45


def test_nothing_is_sent_on_one_rank() -> None:
    assert count(0, 1, {"direction": "both"}, True) == []


def reduced(rank: int, world_size: int, bytes_at_once: int) -> torch.Tensor:
    """Return this rank's share of a sum that gloo computes in chunks of `bytes_at_once`."""
    import bigdssm.distributed as ours

    usual, ours._GLOO_BYTES = ours._GLOO_BYTES, bytes_at_once
    try:
        return ours.reduce_scatter_rows((rank + 1) * torch.arange(world_size * 7 * 3.0).view(-1, 3))
    finally:
        ours._GLOO_BYTES = usual


@pytest.mark.parametrize("bytes_at_once", [1, 100, 10_000])
def test_a_sum_over_ranks_made_in_slices_is_that_of_the_whole(pools: dict[int, Pool], bytes_at_once: int) -> None:
    """A reduce-scatter in chunks equals the one of the whole."""
    whole = 6 * torch.arange(3 * 7 * 3.0).view(-1, 3)
    assert torch.equal(torch.cat(pools[3].run(reduced, bytes_at_once)), whole)
