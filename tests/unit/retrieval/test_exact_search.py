"""Top documents: sort keys are ordered like scores, and products do not depend on other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bigdssm.retrieval import exact_search as top_module
from bigdssm.retrieval.embed import all_finite
from bigdssm.retrieval.exact_search import inner_products, pack_keys, top_documents, unpack_keys

INF = float("inf")


def test_keys_order_as_scores_do_and_then_the_lower_row_is_the_higher() -> None:
    scores = torch.tensor([3.5, 1e-42, -0.0, 0.0, -1e-42, -2.0, -3e38, -INF])
    keys = pack_keys(scores[None], torch.arange(8))[0]
    assert keys.tolist() == sorted(keys.tolist(), reverse=True)
    found, rows = unpack_keys(keys)
    assert found.tolist() == scores.tolist()
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    assert unpack_keys(pack_keys(torch.tensor([1.0]), torch.tensor(2**31 - 2)))[1].tolist() == [2**31 - 2]


@pytest.mark.parametrize("tile", [5, 64])
def test_of_equal_scores_the_lowest_rows_are_taken(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_module, "TILE_DOCS", tile)
    random = np.random.RandomState(0)
    documents = torch.tensor(random.randint(0, 3, (50, 1)), dtype=torch.float32)
    queries = torch.tensor([[1.0], [0.0], [-2.0]])
    nothing = torch.zeros(0, dtype=torch.int64)
    scores, rows = top_documents(queries, documents, 30, nothing, nothing)
    expected = (queries @ documents.T).sort(dim=1, descending=True, stable=True)
    assert rows.tolist() == expected.indices[:, :30].tolist()
    assert scores.tolist() == expected.values[:, :30].tolist()


@pytest.mark.parametrize("width", [9, 65, 257, 769, 1537])
def test_a_product_has_the_same_bits_in_any_block(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    queries, documents = (torch.randn(n, width, generator=generator) for n in (200, 1500))
    whole = inner_products(queries, documents)
    torch.testing.assert_close(whole, queries @ documents.T, rtol=1e-5, atol=1e-6 * width)
    for m in (1, 2, 7, 40):
        for n in (1, 3, 8, 500):
            assert torch.equal(inner_products(queries[-m:], documents[-n:]), whole[-m:, -n:]), (m, n)


def test_one_non_finite_number_is_detected() -> None:
    assert all_finite(torch.randn(3, 4)) and all_finite(torch.zeros(0, 4))
    for bad in (INF, -INF, float("nan")):
        vectors = torch.randn(5, 6)
        vectors[3, 2] = bad
        assert not all_finite(vectors)
