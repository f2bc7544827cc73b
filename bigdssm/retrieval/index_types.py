"""Types of FAISS index: build, train, fill, and search each one, also restricted to the documents of a filter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import faiss
import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.retrieval.vectors import CodedVectors

_made: Any = faiss  # whose stubs lack what its Python adds to classes of C++
LOOKED_AT = 8  # an inverted file looks at one list in so many
MANY_QUERIES = 20  # from which FAISS multiplies matrices, ten times as fast, where no selector forbids it


@dataclass(frozen=True, eq=False)
class AllowedDocuments:
    """The documents that may be found."""

    mask: np.ndarray  # bool [N]

    @cached_property
    def count(self) -> int:
        """Return how many there are."""
        return int(self.mask.sum())

    @cached_property
    def selector(self) -> Any:
        """Return what FAISS asks for each document."""
        return _made.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


def scan(
    index: faiss.Index, queries: np.ndarray, wanted: int, allowed: AllowedDocuments | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, rows int64), both [m, wanted], best first.

    queries are float32 [m, D+1]; `wanted` is at least 1 and at most the number of documents, or of those `allowed`.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    share = 1.0 if allowed is None else allowed.count / index.ntotal
    scores, rows = _searched(index, queries, wanted, allowed, thoroughness=1 / share)
    short = (rows < 0).any(axis=1)
    if short.any():
        scores[short], rows[short] = _searched(index, queries[short], wanted, allowed, thoroughness=LOOKED_AT)
    return scores, rows


def _searched(
    index: faiss.Index, queries: np.ndarray, wanted: int, allowed: AllowedDocuments | None, thoroughness: float
) -> tuple[np.ndarray, np.ndarray]:
    """Search with so many times the usual effort; of LOOKED_AT every document is looked at."""
    chosen: dict[str, Any] = {} if allowed is None else {"sel": allowed.selector}
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        lists = faiss.extract_index_ivf(index)
        parameters = _made.SearchParametersPreTransform(index_params=_of_lists(lists, thoroughness, chosen))
    elif isinstance(index, faiss.IndexIVF):
        parameters = _of_lists(index, thoroughness, chosen)
    elif isinstance(index, faiss.IndexHNSW) and thoroughness < LOOKED_AT:
        width = int(max(index.hnsw.efSearch, wanted) * thoroughness)
        parameters = _made.SearchParametersHNSW(efSearch=width, **chosen)
    else:
        if isinstance(index, faiss.IndexHNSW):
            index = faiss.downcast_index(index.storage)
        if allowed is not None and isinstance(index, faiss.IndexFlat) and len(queries) >= MANY_QUERIES:
            return _multiplied(index, queries, wanted, allowed)
        parameters = _made.SearchParameters(**chosen) if chosen else None
    scores, rows = index.search(queries, wanted, params=parameters)
    return scores, rows


def _multiplied(
    index: faiss.IndexFlat, queries: np.ndarray, wanted: int, allowed: AllowedDocuments
) -> tuple[np.ndarray, np.ndarray]:
    """Search a copy of the allowed documents' vectors."""
    every = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    scores, places = faiss.knn(queries, every[allowed.mask], wanted, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, np.flatnonzero(allowed.mask)[places]


def _of_lists(lists: Any, thoroughness: float, chosen: dict[str, Any]) -> Any:
    probed = lists.nlist if thoroughness >= LOOKED_AT else min(lists.nlist, int(np.ceil(lists.nprobe * thoroughness)))
    return _made.SearchParametersIVF(nprobe=probed, **chosen)


IndexType = Literal["flat", "sq8", "binary", "hnsw", "ivf", "ivfpq"]
HNSW_LINKS, HNSW_BUILD_WIDTH, HNSW_SEARCH_WIDTH = 32, 200, 200
ROWS_AT_ONCE = 65_536
TRAINING_POINTS = 39  # FAISS wants so many for a list of an inverted file
IVF_ROUNDS = 10  # of k-means, as many as FAISS itself makes
PQ_LEAST_DOCS = TRAINING_POINTS * 256  # a code is a byte
PQ_ROUNDS, PQ_POINTS = 10, 64  # of k-means, and points per centroid: FAISS's 25 and 256 take ten times as long
PQ_DIMENSIONS = 2  # of a vector, that one byte of its code stands for


def faiss_index(kind: IndexType, vectors: CodedVectors, after_piece: Callable[[], None] = lambda: None) -> faiss.Index:
    """Return the inner-product index of `vectors` [N, D+1], trained and filled. Raises ConfigError: too few.

    after_piece: called after each ROWS_AT_ONCE vectors that are added and, for ivf, each of the IVF_ROUNDS before.
    """
    index = _empty_index(kind, vectors, after_piece)
    for piece in vectors.pieces(ROWS_AT_ONCE):
        index.add(np.ascontiguousarray(piece))
        after_piece()
    return index


def search_with(threads: int) -> None:
    """Have FAISS search with so many threads where this thread asks it to; every thread has a number of its own."""
    faiss.omp_set_num_threads(threads)


def _empty_index(kind: IndexType, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
    num_docs, width = len(vectors), vectors.width
    index: Any
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD_WIDTH, HNSW_SEARCH_WIDTH
        return index
    if kind == "sq8":
        index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(vectors, 65_536))
        return index
    if kind == "binary":
        index = faiss.IndexRaBitQ(width, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(vectors, 65_536))
        return index
    num_lists = max(1, min(int(4 * num_docs**0.5), num_docs // TRAINING_POINTS))
    sample = _sample(vectors, 256 * max(num_lists, 256))
    if kind == "ivf":
        index = faiss.index_factory(width, f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.quantizer.add(_centres(sample, num_lists, after_round))
    else:
        if num_docs < PQ_LEAST_DOCS:
            raise ConfigError(
                f"--type ivfpq: {num_docs} documents, needs at least {PQ_LEAST_DOCS} to learn its codes from; take flat"
            )
        codes = -(-width // PQ_DIMENSIONS)
        padded = codes * PQ_DIMENSIONS
        index = faiss.index_factory(width, f"Pad{padded},IVF{num_lists},PQ{codes}", faiss.METRIC_INNER_PRODUCT)
        lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        learning = lists.pq.cp
        learning.niter, learning.max_points_per_centroid = PQ_ROUNDS, PQ_POINTS
    index.train(sample)
    faiss.extract_index_ivf(index).nprobe = max(1, num_lists // LOOKED_AT)
    return index


def _centres(sample: np.ndarray, number: int, after_round: Callable[[], None]) -> np.ndarray:
    """Return the centres that FAISS's k-means finds for inner products, a round at a time."""
    width = sample.shape[1]
    learning: Any = faiss.Clustering(width, number)
    learning.niter, learning.spherical = 1, True
    for _ in range(IVF_ROUNDS):  # each goes on from the centres of the one before
        learning.train(sample, faiss.IndexFlatIP(width))
        after_round()
    return np.asarray(faiss.vector_float_to_array(learning.centroids)).reshape(number, width)


def _sample(vectors: CodedVectors, most: int) -> np.ndarray:
    """Return evenly spaced vectors, `most` of them where there are more."""
    rows = np.linspace(0, len(vectors) - 1, min(len(vectors), most)).astype(np.int64)
    return np.ascontiguousarray(vectors[rows])
