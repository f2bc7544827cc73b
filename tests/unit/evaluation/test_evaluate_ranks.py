"""Exact ranks: hand-worked rows, and agreement with the definition on random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bigdssm.evaluation import evaluate as ranks_module
from bigdssm.evaluation.evaluate import Pairs, ranks_of_scores, ranks_of_vectors


def seen_of(rows: list[list[int]]) -> Pairs:
    pairs = [(query, doc) for query, row in enumerate(rows) for doc in row]
    queries, docs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return queries, docs


def by_definition(scores: np.ndarray, target: np.ndarray, seen: list[list[int]]) -> list[float]:
    ranks = []
    for row, own, gone in zip(scores, target, seen, strict=True):
        others = np.array([j for j in range(len(row)) if j != own and j not in gone], np.int64)
        ranks.append(1 + (row[others] > row[own]).sum() + 0.5 * (row[others] == row[own]).sum())
    return ranks


def one_hot_vectors(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and documents whose inner products are exactly `scores`."""
    return torch.eye(len(scores)), scores.T.contiguous()


@pytest.mark.parametrize("through", ["scores", "vectors"])
def test_hand_worked(through: str) -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 4.0, 1.0], [5.0, 4.0, 3.0, 4.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    target = torch.tensor([1, 4, 0])
    seen = seen_of([[0], [4, 1, 0, 0], []])
    # Row 0: 5.0 is seen, one tie. Row 1: its target is seen but stays; 3.0 and 4.0 remain above it.
    # Row 2: four ties.
    expected = [1.5, 3.0, 3.0]
    if through == "scores":
        ranks, _ = ranks_of_scores(scores, target, seen)
    else:
        ranks = ranks_of_vectors(*one_hot_vectors(scores), target, seen)
    assert ranks.tolist() == expected
    assert ranks.dtype == torch.float64


@pytest.mark.parametrize("tile", [1, 7, 10_000])
def test_tiles_and_blocks_change_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "SCORES_PER_TILE", tile * 512)
    random = np.random.RandomState(0)
    num_queries, num_docs = 700, 40  # more queries than one block
    documents = torch.tensor(random.randint(-2, 3, (num_docs, 4)), dtype=torch.float32)
    queries = torch.tensor(random.randint(-2, 3, (num_queries, 4)), dtype=torch.float32)
    target = random.randint(0, num_docs, num_queries)
    seen = [random.randint(0, num_docs, random.randint(0, 30)).tolist() for _ in range(num_queries)]
    expected = by_definition((queries @ documents.T).numpy(), target, seen)
    assert ranks_of_vectors(queries, documents, torch.tensor(target), seen_of(seen)).tolist() == expected
    assert ranks_of_scores(queries @ documents.T, torch.tensor(target), seen_of(seen))[0].tolist() == expected


def test_rounding_noise_of_equal_documents_is_a_tie() -> None:
    torch.manual_seed(0)
    document = torch.nn.functional.normalize(torch.randn(1, 65), dim=1) * 100
    noise = 1 + torch.finfo(torch.float32).eps * torch.randint(-1, 2, (500, 65))
    queries = torch.nn.functional.normalize(torch.randn(20, 65), dim=1)
    ranks = ranks_of_vectors(queries, document * noise, torch.arange(20))
    assert ranks.tolist() == [250.5] * 20


def test_close_scores_are_no_ties() -> None:
    queries = torch.ones(1, 2)
    documents = torch.stack([torch.ones(100), torch.arange(100) * 1e-4], dim=1)
    assert ranks_of_vectors(queries, documents, torch.tensor([40])).tolist() == [60.0]


def test_no_queries() -> None:
    assert ranks_of_vectors(torch.zeros(0, 3), torch.ones(5, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
