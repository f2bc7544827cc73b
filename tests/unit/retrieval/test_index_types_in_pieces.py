"""An approximate index is built in chunks that report progress to the watchdog, equally often on every rank."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from bigdssm.retrieval import index_types
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.retrieval.exact_search import ExcludedDocuments, approximate_search, exact_search, unpack_keys
from bigdssm.retrieval.index_types import INDEX_TYPES, IVF_ROUNDS
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import CodedVectors

WIDTH, TOLD = 9, "an index of the documents built"


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1000, WIDTH), dtype=np.float32)


def test_every_round_and_every_chunk_is_reported(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work between two reports is bounded: one k-means round or one chunk of vectors."""
    monkeypatch.setattr(index_types, "ROWS_AT_ONCE", 300)
    done: list[tuple[str, int]] = []
    train, add = faiss.Clustering.train, faiss.IndexIVFFlat.add

    def train_noted(self: faiss.Clustering, *given: object) -> None:
        done.append(("train", self.niter))
        train(self, *given)

    def add_noted(self: faiss.IndexIVFFlat, piece: np.ndarray) -> None:
        done.append(("add", len(piece)))
        add(self, piece)

    monkeypatch.setattr(faiss.Clustering, "train", train_noted)
    monkeypatch.setattr(faiss.IndexIVFFlat, "add", add_noted)
    INDEX_TYPES.make("ivf").build(CodedVectors(vectors, "float32", WIDTH), lambda: done.append(("told", 0)))
    assert done[::2] == [("train", 1)] * IVF_ROUNDS + [("add", 300)] * 3 + [("add", 100)]
    assert done[1::2] == [("told", 0)] * (IVF_ROUNDS + 4)


def test_the_centres_equal_those_of_one_faiss_call(vectors: np.ndarray) -> None:
    index = INDEX_TYPES.make("ivf").build(CodedVectors(vectors, "float32", WIDTH))
    lists = index.nlist
    whole = faiss.index_factory(WIDTH, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    whole.train(vectors)
    assert lists > 20 and index.nprobe < lists
    np.testing.assert_allclose(*(one.quantizer.reconstruct_n(0, lists) for one in (index, whole)), atol=1e-5)


@pytest.mark.parametrize(("num_docs", "most_pieces"), [(1, 1), (2, 1), (120, 2), (121, 3)])
def test_all_ranks_report_equally_often_for_any_share(
    vectors: np.ndarray, num_docs: int, most_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reporting is a collective: a rank with more chunks, or without documents, would hang the others."""
    monkeypatch.setattr(index_types, "ROWS_AT_ONCE", 20)
    told = []
    queries, nothing = torch.from_numpy(vectors[:50]), torch.empty(0, dtype=torch.int64)
    for rank in range(3):
        calls: list[tuple[str, int, int | None]] = []
        share = Share(rank, 3, progress=lambda *call, calls=calls: calls.append(call))  # type: ignore[misc]
        first, last = share.of(num_docs)
        documents = DocumentVectors(torch.from_numpy(vectors[first:last]), first)
        found, exact = (
            unpack_keys(search(queries, 1, ExcludedDocuments(nothing, nothing)))[1]
            for search in (approximate_search(documents, num_docs, share), exact_search(documents))
        )
        assert torch.equal(found, exact)  # with one list
        told.append(calls)
    total = IVF_ROUNDS + most_pieces
    assert told == [[(TOLD, piece, total) for piece in range(1, total + 1)]] * 3
