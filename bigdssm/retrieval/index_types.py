"""Index types: each declares options and builds, writes, reads and searches its indexes.

A new type is a subclass of `IndexBackend` (or of `FaissIndex`), registered with `register_index`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.retrieval.vectors import CodedVectors
from bigdssm.utils.components import Registry, bounded

_untyped: Any = faiss  # its stubs lack keyword constructors
PROBE_FRACTION = 8  # by default an inverted file probes 1 list in 8; at 8 times the effort, all
MANY_QUERIES = 20  # from here FAISS uses matrix products (10 times as fast), but not with a selector
ROWS_AT_ONCE = 65_536
SAMPLE = 65_536  # vectors that quantizers are trained on
TRAINING_POINTS = 39  # least per list of an inverted file, as in FAISS
IVF_ROUNDS = 10  # of k-means, FAISS's default
PQ_LEAST_DOCS = TRAINING_POINTS * 256  # a code is a byte
PQ_ROUNDS, PQ_POINTS = 10, 64  # k-means rounds and points per centroid: FAISS's 25 and 256 are ten times slower
MAX_LISTS, MAX_WIDTH = 2**24, 2**16


@dataclass(frozen=True, eq=False)
class AllowedDocuments:
    """The documents that pass a filter."""

    mask: np.ndarray  # bool [N]

    @classmethod
    def without(cls, withdrawn: np.ndarray, num_docs: int) -> "AllowedDocuments | None":
        """Return the first `num_docs` documents without those at the rows `withdrawn`; None if none is withdrawn."""
        mask = np.ones(num_docs, bool)
        mask[withdrawn[withdrawn < num_docs]] = False
        return None if mask.all() else cls(mask)

    @cached_property
    def count(self) -> int:
        """Return the number of allowed documents."""
        return int(self.mask.sum())

    @cached_property
    def selector(self) -> Any:
        """Return the FAISS selector of the mask."""
        return _untyped.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


@dataclass(frozen=True)
class IndexBackend(ABC):
    """A type of inner-product index over vectors [N, D+1]; dataclass fields are options."""

    type: ClassVar[str]
    needs_rescore: ClassVar[bool] = False  # whether its scores are too coarse to return

    @abstractmethod
    def build(self, vectors: CodedVectors, after_chunk: Callable[[], None] = lambda: None) -> Any:
        """Train and fill an index of `vectors`. Raises ConfigError: too few vectors."""

    @abstractmethod
    def write(self, index: Any, path: Path) -> None:
        """Write an index to the file `path`."""

    @abstractmethod
    def read(self, path: Path) -> Any:
        """Read an index from a file with a valid checksum. Raises RuntimeError, OSError or ValueError."""

    @abstractmethod
    def shape(self, index: Any) -> tuple[int, int]:
        """Return (N, D+1) of an index."""

    @abstractmethod
    def search(
        self, index: Any, queries: np.ndarray, top: int, allowed: AllowedDocuments | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32, rows int64), both [m, top], best first.

        queries are float32 [m, D+1]; `top` is at least 1 and at most the number of (allowed) documents, and every query
        must get `top` results.
        """

    @abstractmethod
    def vectors_at(self, index: Any, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of documents, float32 [n, D+1], with the precision of the index."""


INDEX_TYPES: Registry[IndexBackend] = Registry("an index type", "type", IndexBackend)
register_index = INDEX_TYPES.register


@dataclass(frozen=True)
class FaissIndex(IndexBackend):
    """An index of FAISS."""

    @abstractmethod
    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return an empty index of the vectors' width, trained on them if the type needs training."""

    def build(self, vectors: CodedVectors, after_chunk: Callable[[], None] = lambda: None) -> faiss.Index:
        """Train and fill the index. Raises ConfigError: too few vectors.

        after_chunk: called after each of the IVF_ROUNDS (ivf only) and after each ROWS_AT_ONCE added vectors.
        """
        index = self.empty(vectors, after_chunk)
        for chunk in vectors.chunks(ROWS_AT_ONCE):
            index.add(np.ascontiguousarray(chunk))
            after_chunk()
        return index

    def write(self, index: faiss.Index, path: Path) -> None:
        """Write FAISS's format."""
        faiss.write_index(index, str(path))

    def read(self, path: Path) -> faiss.Index:
        """Map the file."""
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)

    def shape(self, index: faiss.Index) -> tuple[int, int]:
        """Return (N, D+1)."""
        return index.ntotal, index.d

    def vectors_at(self, index: faiss.Index, rows: np.ndarray) -> np.ndarray:
        """Reconstruct vectors from the index."""
        vectors = [index.reconstruct(int(row)) for row in rows]
        return np.array(vectors, np.float32).reshape(len(vectors), index.d)

    def search(
        self, index: faiss.Index, queries: np.ndarray, top: int, allowed: AllowedDocuments | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search; with a filter, widen the probe by 1 / selectivity, and search all if results are missing."""
        index, queries = faiss.downcast_index(index), np.ascontiguousarray(queries, np.float32)
        share = 1.0 if allowed is None else allowed.count / index.ntotal
        scores, rows = self._search(index, queries, top, allowed, 1 / share)
        short = (rows < 0).any(axis=1)
        if short.any():
            scores[short], rows[short] = self._search(index, queries[short], top, allowed, PROBE_FRACTION)
        return scores, rows

    def _search(
        self, index: Any, queries: np.ndarray, top: int, allowed: AllowedDocuments | None, effort: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search with `effort` times the default effort; PROBE_FRACTION scores every document."""
        selector = {} if allowed is None else {"sel": allowed.selector}
        scores, rows = index.search(queries, top, params=self._parameters(index, top, selector, effort))
        return scores, rows

    def _parameters(self, index: Any, top: int, selector: dict[str, Any], effort: float) -> Any:
        return _untyped.SearchParameters(**selector) if selector else None


@register_index
@dataclass(frozen=True)
class Flat(FaissIndex):
    """Exact search over all documents."""

    type: ClassVar[str] = "flat"

    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return FAISS's flat index."""
        return faiss.IndexFlatIP(vectors.width)

    def _search(
        self, index: Any, queries: np.ndarray, top: int, allowed: AllowedDocuments | None, effort: float
    ) -> tuple[np.ndarray, np.ndarray]:
        if allowed is None or len(queries) < MANY_QUERIES:
            return super()._search(index, queries, top, allowed, effort)
        every = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
        scores, positions = faiss.knn(queries, every[allowed.mask], top, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, np.flatnonzero(allowed.mask)[positions]


@register_index
@dataclass(frozen=True)
class ScalarQuantizer(FaissIndex):
    """Flat with a byte per dimension (int8)."""

    type: ClassVar[str] = "sq8"

    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return FAISS's scalar quantizer of 8 bits."""
        index = faiss.IndexScalarQuantizer(vectors.width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(vectors, SAMPLE))
        return index


@register_index
@dataclass(frozen=True)
class Binary(FaissIndex):
    """Flat with a bit per dimension; needs rescoring."""

    type: ClassVar[str] = "binary"
    needs_rescore: ClassVar[bool] = True

    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return FAISS's RaBitQ."""
        index = faiss.IndexRaBitQ(vectors.width, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(vectors, SAMPLE))
        return index


@register_index
@dataclass(frozen=True)
class Hnsw(FaissIndex):
    """HNSW graph of inner products. Source: Malkov and Yashunin 2018.

    The graph is built on the vectors minus their mean, which changes no ranking: a part that all vectors share would
    link each of them to the same few.
    """

    type: ClassVar[str] = "hnsw"

    links: int = bounded(32, 2, 1024)  # neighbours per document and layer
    build_width: int = bounded(200, 1, MAX_WIDTH)  # candidates while building; more: better neighbours
    search_width: int = bounded(200, 1, MAX_WIDTH)  # candidates while searching; more: better recall, slower

    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return FAISS's HNSW over float32 vectors."""
        index: Any = faiss.IndexHNSWFlat(vectors.width, self.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = self.build_width, self.search_width
        return index

    def build(self, vectors: CodedVectors, after_chunk: Callable[[], None] = lambda: None) -> faiss.Index:
        """Link the centred vectors, and store the vectors.

        after_chunk: called after each ROWS_AT_ONCE vectors.
        """
        index: Any = self.empty(vectors, after_chunk)
        mean = np.zeros(vectors.width)
        for chunk in vectors.chunks(ROWS_AT_ONCE):
            mean += chunk.sum(axis=0, dtype=np.float64) / len(vectors)
        for chunk in vectors.chunks(ROWS_AT_ONCE):
            index.add(chunk - mean.astype(np.float32))
            after_chunk()
        storage: Any = faiss.downcast_index(index.storage)
        storage.reset()
        for chunk in vectors.chunks(ROWS_AT_ONCE):
            storage.add(np.ascontiguousarray(chunk))
        return index

    def _search(
        self, index: Any, queries: np.ndarray, top: int, allowed: AllowedDocuments | None, effort: float
    ) -> tuple[np.ndarray, np.ndarray]:
        if effort >= PROBE_FRACTION:
            return Flat()._search(faiss.downcast_index(index.storage), queries, top, allowed, effort)
        return super()._search(index, queries, top, allowed, effort)

    def _parameters(self, index: Any, top: int, selector: dict[str, Any], effort: float) -> Any:
        return _untyped.SearchParametersHNSW(efSearch=int(max(index.hnsw.efSearch, top) * effort), **selector)


@register_index
@dataclass(frozen=True)
class InvertedFile(FaissIndex):
    """Inverted file: documents clustered in lists; the nearest lists are probed."""

    type: ClassVar[str] = "ivf"

    lists: int = bounded(0, 0, MAX_LISTS)  # 0: 4 √N; at most one per 39 documents
    probes: int = bounded(0, 0, MAX_LISTS)  # lists probed per query; 0: one in 8. More: better recall, slower

    def read(self, path: Path) -> faiss.Index:
        """Map the file, and build the direct map from documents to lists that `vectors_at` needs."""
        index = super().read(path)
        faiss.extract_index_ivf(index).make_direct_map()
        return index

    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return an inverted file with trained centroids."""
        num_docs = len(vectors)
        num_lists = max(1, min(self.lists or int(4 * num_docs**0.5), num_docs // TRAINING_POINTS))
        index = self._trained(_sample(vectors, 256 * max(num_lists, 256)), num_docs, num_lists, after_round)
        faiss.extract_index_ivf(index).nprobe = min(num_lists, self.probes or max(1, num_lists // PROBE_FRACTION))
        return index

    def _trained(
        self, sample: np.ndarray, num_docs: int, num_lists: int, after_round: Callable[[], None]
    ) -> faiss.Index:
        # FAISS's spherical k-means, one round at a time, to report progress
        width = sample.shape[1]
        learning: Any = faiss.Clustering(width, num_lists)
        learning.niter, learning.spherical = 1, True
        for _ in range(IVF_ROUNDS):  # each continues from the previous centroids
            learning.train(sample, faiss.IndexFlatIP(width))
            after_round()
        index: Any = faiss.index_factory(width, f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.quantizer.add(np.asarray(faiss.vector_float_to_array(learning.centroids)).reshape(num_lists, width))
        index.train(sample)
        return index

    def _parameters(self, index: Any, top: int, selector: dict[str, Any], effort: float) -> Any:
        probes = index.nlist if effort >= PROBE_FRACTION else min(index.nlist, int(np.ceil(index.nprobe * effort)))
        return _untyped.SearchParametersIVF(nprobe=probes, **selector)


@register_index
@dataclass(frozen=True)
class ProductQuantizer(InvertedFile):
    """Inverted file with product quantization, by default half a byte per dimension."""

    type: ClassVar[str] = "ivfpq"

    dimensions_per_byte: int = bounded(2, 1, 64)

    def _trained(
        self, sample: np.ndarray, num_docs: int, num_lists: int, after_round: Callable[[], None]
    ) -> faiss.Index:
        if num_docs < PQ_LEAST_DOCS:
            raise ConfigError(
                f"--type ivfpq: {num_docs} documents, needs at least {PQ_LEAST_DOCS} to train its codes; use flat"
            )
        codes = -(-sample.shape[1] // self.dimensions_per_byte)
        factory = f"Pad{codes * self.dimensions_per_byte},IVF{num_lists},PQ{codes}"
        index: Any = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        learning = lists.pq.cp
        learning.niter, learning.max_points_per_centroid = PQ_ROUNDS, PQ_POINTS
        index.train(sample)
        return index

    def _parameters(self, index: Any, top: int, selector: dict[str, Any], effort: float) -> Any:
        lists = super()._parameters(faiss.extract_index_ivf(index), top, selector, effort)
        return _untyped.SearchParametersPreTransform(index_params=lists)


def set_search_threads(threads: int | None) -> None:
    """Set FAISS's thread count for searches from the calling thread (OpenMP's setting is per thread); None: its own."""
    if threads is not None:
        faiss.omp_set_num_threads(threads)


def _sample(vectors: CodedVectors, most: int) -> np.ndarray:
    """Return at most `most` evenly spaced vectors."""
    rows = np.linspace(0, len(vectors) - 1, min(len(vectors), most)).astype(np.int64)
    return np.ascontiguousarray(vectors[rows])
