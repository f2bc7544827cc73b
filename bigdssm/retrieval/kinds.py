"""The kinds of FAISS index, each made, trained and filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import faiss
import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.retrieval.coding import CodedVectors
from bigdssm.retrieval.scan import LOOKED_AT

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
