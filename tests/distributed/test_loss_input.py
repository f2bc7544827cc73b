"""Invalid input on one rank raises one clear error on every rank, and never hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigdssm.errors import BigDSSMError
from bigdssm.losses import FPS, PairCE, Triplet, fps_loss, ranking_loss

from .spawn import Pool

M, N, D = 3, 4, 5


def good() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"U": torch.randn(M, D, generator=generator), "W": torch.randn(N, D, generator=generator), "alpha": 2.0}


INT = torch.arange(M)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "U's shape": ({"U": torch.randn(D)}, "U must be [rows, D]"),
    "U's type": ({"U": [1.0]}, "U must be a tensor"),
    "dtype": ({"U": torch.randn(M, D).half()}, "float64, float32 or bfloat16"),
    "two dtypes": ({"U": torch.randn(M, D).double()}, "they must be the same"),
    "two sizes": ({"U": torch.randn(M, D + 1)}, "U has vectors of size 6, W of size 5"),
    "too few columns": ({"W": torch.randn(M - 1, D)}, "without `positive` W needs a column"),
    "positive's dtype": ({"positive": INT.int()}, "positive must be int64"),
    "positive's shape": ({"positive": INT[:2]}, "positive must be [3]"),
    "positive too high": ({"positive": INT + 2}, "positive holds 4, outside this rank's 4 columns"),
    "positive too low": ({"positive": INT - 1}, "positive holds -1"),
    "NaN weight": ({"weight": torch.tensor([1.0, float("nan"), 1.0])}, "weight holds NaN"),
    "negative weight": ({"weight": torch.tensor([1.0, -1.0, 1.0])}, "weight holds NaN, infinite or negative"),
    "weight's shape": ({"weight": torch.ones(M + 1)}, "weight must be [3]"),
    "query_ids' dtype": ({"query_ids": torch.ones(M)}, "query_ids must be int64"),
    "doc_ids' dtype": ({"doc_ids": torch.arange(N).int()}, "doc_ids must be int64"),
    "doc_ids' shape": ({"doc_ids": torch.arange(M)}, "doc_ids must be [4]"),
    "beta's shape": ({"beta": torch.zeros(1)}, "beta must be [4]"),
    "neg_bias +inf": ({"neg_bias": torch.full((N,), float("inf"))}, "neg_bias holds +inf"),
    "neg_bias' gradient": ({"neg_bias": torch.zeros(N, requires_grad=True)}, "it gets no gradient"),
    "known without ids": ({"known": torch.zeros(1, 2, dtype=torch.int64)}, "known pairs need doc_ids"),
    "known's shape": (
        {"doc_ids": torch.arange(N), "known": torch.zeros(2, 3, dtype=torch.int64)},
        "known must be [pairs, 2]",
    ),
    "known rows": (
        {"doc_ids": torch.arange(N), "known": torch.tensor([[M, 0]])},
        "known holds a row outside this rank's",
    ),
    "alpha's shape": ({"alpha": torch.ones(2)}, "alpha must be one float"),
    "alpha's type": ({"alpha": "2"}, "alpha must be one float, got str"),
    "a list of ids": ({"doc_ids": [1, 2, 3, 4]}, "doc_ids must be a tensor, got list"),
    "a list of weights": ({"weight": [1.0, 1.0, 1.0]}, "weight must be a tensor, got list"),
    "weight's gradient": ({"weight": torch.ones(M, requires_grad=True)}, "weight is a constant of the data"),
    "tile": ({"tile": 0}, "tile must be at least 1"),
    "direction's name": ({"direction": "d2d"}, "direction must be one of"),
    # differences that only the comparison of ranks detects
    "another D": ({"U": torch.randn(M, D + 1), "W": torch.randn(N, D + 1)}, "disagree on the vector size D"),
    "another dtype": ({"U": torch.randn(M, D).double(), "W": torch.randn(N, D).double()}, "disagree on the dtype"),
    "another direction": ({"direction": "both"}, "disagree on the loss or its direction"),
    "another alpha": ({"alpha": 3.0}, "disagree on alpha"),
    "ids on one rank": ({"doc_ids": torch.arange(N)}, "disagree on which of beta"),
}


def call_fps(rank: int, world_size: int, bad: dict[str, Any]) -> str:
    arguments = {**good(), **(bad if rank == 1 else {})}
    U, W = arguments.pop("U"), arguments.pop("W")
    try:
        fps_loss(U, W, arguments.pop("positive", None), **arguments)
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_stops_every_rank(pools: dict[int, Pool], case: str) -> None:
    bad, expected = BAD[case]
    for message in pools[2].run(call_fps, bad, timeout_s=20):
        assert expected in message


def call_ranking(rank: int, world_size: int, bad: dict[str, Any]) -> str:
    arguments = {**good(), "loss": PairCE(), "in_batch": True, **(bad if rank == 1 else {})}
    try:
        ranking_loss(**arguments)
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"loss": "hinge"}, "the loss must be one of fps, softmax, pair_ce, triplet, got 'hinge'"),
        ({"loss": FPS(direction="both")}, "direction must be one of q2d, got 'both'"),
        ({"in_batch": False}, "needs negatives, in_batch=True, or both"),
        ({"negatives": torch.zeros(M, 2)}, "negatives must be int64"),
        ({"negatives": [[1]] * M}, "negatives must be int64, got list"),
        ({"negatives": torch.zeros(M + 1, 2, dtype=torch.int64)}, "negatives must be [3, k]"),
        ({"negatives": torch.full((M, 2), N)}, "negatives hold a column outside -1"),
        ({"loss": Triplet()}, "disagree on the loss or its direction"),
    ],
)
def test_bad_negatives_stop_every_rank(pools: dict[int, Pool], bad: dict[str, Any], expected: str) -> None:
    for message in pools[2].run(call_ranking, bad, timeout_s=20):
        assert expected in message
