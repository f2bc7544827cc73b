"""Batches: one column per distinct document, positives first, all values correct."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.loader.batch import Collator, distinct_in_order
from bigdssm.loader.stream import PairStream
from bigdssm.utils.hashing import hash64


def first_rows(folder: Path, count: int = 1) -> tuple[Dataset, Collator, Rows]:
    dataset = Dataset.open(folder)
    *_, rows = islice(PairStream(dataset, rows_global=64, lanes=4), count)
    return dataset, Collator(dataset.schema, dataset.catalogue), rows


def test_tensors_of_a_batch_with_histories(interactions: Path) -> None:
    dataset, collate, rows = first_rows(interactions)
    batch = collate(rows)
    assert batch.step == rows.step
    assert batch.doc_rows[batch.positive].tolist() == rows.doc_rows.tolist()
    assert len(batch.doc_rows) == len(set(rows.doc_rows.tolist()))
    assert torch.equal(batch.doc_ids, torch.from_numpy(dataset.catalogue.doc_ids[batch.doc_rows]))
    assert torch.equal(batch.doc["item"], batch.doc_rows + 2)
    assert torch.equal(batch.doc["year"], (1950 + batch.doc_rows).float())
    tags = [[2 + r % 3] * (r % 3) + [0] * (2 - r % 3) for r in batch.doc_rows.tolist()]
    assert batch.doc["tags"].tolist() == tags
    history = batch.query["history"]
    for i, row in enumerate(batch.row_ids.tolist()):
        length = min(5, row % 30)
        assert (history[i, :length] > 0).all()
        assert (history[i, length:] == 0).all()
    dtypes = {t.dtype for t in (batch.row_ids, batch.positive, batch.query_ids, batch.doc_ids, batch.doc_rows, history)}
    assert dtypes == {torch.int64}
    assert batch.relevance.dtype == batch.query["age"].dtype == batch.doc["year"].dtype == torch.float32


def test_text_is_padded_with_no_token(texts: Path) -> None:
    _, collate, rows = first_rows(texts)
    batch = collate(rows)
    assert batch.query["words"].dtype == torch.int64
    for row, tokens in zip(batch.row_ids.tolist(), batch.query["words"].tolist(), strict=True):
        assert tokens == ([1, *range(3, 3 + row % 4), 2] + [-1] * 5)[: len(tokens)]
    docs = (batch.doc["item"] - 2).tolist()
    assert docs == list(dict.fromkeys(docs))
    for doc, tokens in zip(docs, batch.doc["title"].tolist(), strict=True):
        assert tokens == ([1, *range(3, 3 + doc % 5), 2] + [-1] * 8)[: len(tokens)]
    assert batch.doc_ids.tolist() == [hash64(f"d{doc}") for doc in docs]
    assert [docs[c] for c in batch.positive.tolist()] == [row * 7 % 37 for row in batch.row_ids.tolist()]


def test_rows_that_bring_their_documents_give_the_same_features(texts: Path) -> None:
    dataset, collate, rows = first_rows(texts)
    brought = replace(
        rows, doc=dataset.catalogue.columns(rows.doc_rows), doc_ids=dataset.catalogue.ids(rows.doc_rows),
        doc_rows=np.full(len(rows), -1, np.int64),
    )  # fmt: skip
    plain = Collator(dataset.schema, None)
    mine, its = plain(brought), collate(rows)
    assert torch.equal(its.positive, mine.positive) and torch.equal(its.doc_ids, mine.doc_ids)
    assert all(torch.equal(its.doc[name], mine.doc[name]) for name in its.doc)
    assert mine.doc_rows.tolist() == [-1] * len(mine.doc_ids) and len(mine.doc_ids) < len(rows)
    assert len(plain(brought.take(np.empty(0, np.int64))).doc["title"]) == 0
    with pytest.raises(ConfigError, match="hard and uniform negatives need a catalogue"):
        plain(brought, extra_docs=np.array([1]))


def test_negatives_and_extra_documents_become_columns_behind_the_positives(interactions: Path) -> None:
    _, collate, rows = first_rows(interactions)
    rows = replace(rows.take(np.arange(5)), doc_rows=np.array([3, 4, 3, 5, 4]))
    negatives = np.array([[4, 9], [-1, -1], [9, 20], [3, -1], [21, 5]])
    batch = collate(rows, negatives=negatives, extra_docs=np.array([20, 30, 3, 30]))
    assert batch.doc_rows.tolist() == [3, 4, 5, 9, 20, 21, 30]
    assert batch.positive.tolist() == [0, 1, 0, 2, 1]
    assert batch.negatives is not None
    assert batch.negatives.tolist() == [[1, 3], [-1, -1], [3, 4], [0, -1], [5, 2]]
    assert torch.equal(batch.doc["item"], batch.doc_rows + 2)


def test_no_rows_make_an_empty_batch(interactions: Path, texts: Path) -> None:
    for folder in (interactions, texts):
        dataset, collate, _ = first_rows(folder)
        batch = collate(next(dataset.iterate("test", 10)).take(np.empty(0, np.int64)))
        assert len(batch.row_ids) == len(batch.positive) == len(batch.doc_ids) == 0
        for features in (batch.query, batch.doc):
            assert all(tensor.shape[0] == 0 for tensor in features.values())
            assert all(tensor.shape[1] >= 1 for tensor in features.values() if tensor.ndim == 2)


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5)))
def test_distinct_in_order(values: list[int]) -> None:
    distinct, index = distinct_in_order(np.array(values, np.int64))
    assert distinct.tolist() == list(dict.fromkeys(values))
    assert distinct[index].tolist() == values
