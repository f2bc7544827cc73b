"""Types of index: each declares its options, and builds, writes, reads and searches its indexes.

A new type is a subclass of `IndexBackend` (or of `FaissIndex`) that is registered with `register_index`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.retrieval.vectors import CodedVectors
from bigdssm.utils.bounds import bounded
from bigdssm.utils.components import Registry

_made: Any = faiss  # whose stubs lack what its Python adds to classes of C++
LOOKED_AT = 8  # by default an inverted file probes one list in so many; with so many times the effort, all
MANY_QUERIES = 20  # from which FAISS multiplies matrices, ten times as fast, where no selector forbids it
ROWS_AT_ONCE = 65_536
SAMPLE = 65_536  # vectors that quantizers are trained on
TRAINING_POINTS = 39  # FAISS wants so many for a list of an inverted file
IVF_ROUNDS = 10  # of k-means, as many as FAISS itself makes
PQ_LEAST_DOCS = TRAINING_POINTS * 256  # a code is a byte
PQ_ROUNDS, PQ_POINTS = 10, 64  # of k-means, and points per centroid: FAISS's 25 and 256 take ten times as long
MAX_LISTS, MAX_WIDTH = 2**24, 2**16


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


def nothing() -> None:
    """Take no notice of a finished piece."""


@dataclass(frozen=True)
class IndexBackend(ABC):
    """A type of inner-product index of vectors [N, D+1]; its fields are its options."""

    type: ClassVar[str]
    needs_rescore: ClassVar[bool] = False  # whether its scores are too coarse to be shown

    @abstractmethod
    def build(self, vectors: CodedVectors, after_piece: Callable[[], None] = nothing) -> Any:
        """Return the trained and filled index of `vectors`. Raises ConfigError: too few of them."""

    @abstractmethod
    def write(self, index: Any, path: Path) -> None:
        """Write an index into the file `path`."""

    @abstractmethod
    def read(self, path: Path) -> Any:
        """Return the index of a file, whose checksum holds. Raises RuntimeError, OSError or ValueError."""

    @abstractmethod
    def shape(self, index: Any) -> tuple[int, int]:
        """Return (N, D+1) of an index."""

    @abstractmethod
    def search(
        self, index: Any, queries: np.ndarray, top: int, allowed: AllowedDocuments | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32, rows int64), both [m, top], best first.

        queries are float32 [m, D+1]; `top` is at least 1 and at most the number of documents, or of those `allowed`,
        and every query is answered with so many.
        """

    @abstractmethod
    def vectors_at(self, index: Any, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of documents, float32 [n, D+1], as exact as the index keeps them."""


INDEX_TYPES: Registry[IndexBackend] = Registry("an index type", "type")
register_index = INDEX_TYPES.register


def index_type(kind: str | IndexBackend, options: Mapping[str, Any] | None = None) -> IndexBackend:
    """Return a type of index by name, with options of its own. Raises ConfigError: no such type, option or value."""
    if isinstance(kind, IndexBackend):
        return index_type(kind.type, asdict(kind))
    return INDEX_TYPES.read("", {**(options or {}), "type": kind})


@dataclass(frozen=True)
class FaissIndex(IndexBackend):
    """An index of FAISS."""

    @abstractmethod
    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return an index of the vectors' width, trained on them where it learns, without any."""

    def build(self, vectors: CodedVectors, after_piece: Callable[[], None] = nothing) -> faiss.Index:
        """Return the index, trained and filled. Raises ConfigError: too few vectors.

        after_piece: called after each ROWS_AT_ONCE vectors that are added and, for ivf, each of the IVF_ROUNDS before.
        """
        index = self.empty(vectors, after_piece)
        for piece in vectors.pieces(ROWS_AT_ONCE):
            index.add(np.ascontiguousarray(piece))
            after_piece()
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
        """Return vectors as the index reconstructs them."""
        found = [index.reconstruct(int(row)) for row in rows]
        return np.array(found, np.float32).reshape(len(found), index.d)

    def search(
        self, index: faiss.Index, queries: np.ndarray, top: int, allowed: AllowedDocuments | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search, where some documents are not allowed or too few are found with a multiple of the usual effort."""
        index, queries = faiss.downcast_index(index), np.ascontiguousarray(queries, np.float32)
        share = 1.0 if allowed is None else allowed.count / index.ntotal
        scores, rows = self._search(index, queries, top, allowed, 1 / share)
        short = (rows < 0).any(axis=1)
        if short.any():
            scores[short], rows[short] = self._search(index, queries[short], top, allowed, LOOKED_AT)
        return scores, rows

    def _search(
        self, index: Any, queries: np.ndarray, top: int, allowed: AllowedDocuments | None, effort: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search with so many times the usual effort; with LOOKED_AT every document is compared."""
        chosen = {} if allowed is None else {"sel": allowed.selector}
        scores, rows = index.search(queries, top, params=self._parameters(index, top, chosen, effort))
        return scores, rows

    def _parameters(self, index: Any, top: int, chosen: dict[str, Any], effort: float) -> Any:
        return _made.SearchParameters(**chosen) if chosen else None


@register_index
@dataclass(frozen=True)
class Flat(FaissIndex):
    """Exact: every document is compared."""

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
        scores, places = faiss.knn(queries, every[allowed.mask], top, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, np.flatnonzero(allowed.mask)[places]


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
    """Flat with a bit per dimension, for candidates that are scored again."""

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
    """A graph of neighbours (Malkov and Yashunin 2018)."""

    type: ClassVar[str] = "hnsw"

    links: int = bounded(32, 2, 1024)  # of a document to neighbours, in each layer
    build_width: int = bounded(200, 1, MAX_WIDTH)  # candidates while building; more: better neighbours
    search_width: int = bounded(200, 1, MAX_WIDTH)  # candidates while searching; more: better recall, slower

    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return FAISS's HNSW over whole vectors."""
        index: Any = faiss.IndexHNSWFlat(vectors.width, self.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = self.build_width, self.search_width
        return index

    def _search(
        self, index: Any, queries: np.ndarray, top: int, allowed: AllowedDocuments | None, effort: float
    ) -> tuple[np.ndarray, np.ndarray]:
        if effort >= LOOKED_AT:
            return Flat()._search(faiss.downcast_index(index.storage), queries, top, allowed, effort)
        return super()._search(index, queries, top, allowed, effort)

    def _parameters(self, index: Any, top: int, chosen: dict[str, Any], effort: float) -> Any:
        return _made.SearchParametersHNSW(efSearch=int(max(index.hnsw.efSearch, top) * effort), **chosen)


@register_index
@dataclass(frozen=True)
class InvertedFile(FaissIndex):
    """Lists of documents around centres, of which the nearest are probed."""

    type: ClassVar[str] = "ivf"

    lists: int = bounded(0, 0, MAX_LISTS)  # 0: 4 √N; at most one for every 39 documents
    probes: int = bounded(0, 0, MAX_LISTS)  # lists probed for a query; 0: one in 8. More: better recall, slower

    def read(self, path: Path) -> faiss.Index:
        """Map the file, with a map from documents to lists, for `vectors_at`."""
        index = super().read(path)
        faiss.extract_index_ivf(index).make_direct_map()
        return index

    def empty(self, vectors: CodedVectors, after_round: Callable[[], None]) -> faiss.Index:
        """Return an inverted file, its centres found."""
        num_docs = len(vectors)
        num_lists = max(1, min(self.lists or int(4 * num_docs**0.5), num_docs // TRAINING_POINTS))
        index = self._trained(_sample(vectors, 256 * max(num_lists, 256)), num_docs, num_lists, after_round)
        faiss.extract_index_ivf(index).nprobe = min(num_lists, self.probes or max(1, num_lists // LOOKED_AT))
        return index

    def _trained(
        self, sample: np.ndarray, num_docs: int, num_lists: int, after_round: Callable[[], None]
    ) -> faiss.Index:
        index: Any = faiss.index_factory(sample.shape[1], f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.quantizer.add(_centres(sample, num_lists, after_round))
        index.train(sample)
        return index

    def _parameters(self, index: Any, top: int, chosen: dict[str, Any], effort: float) -> Any:
        probes = index.nlist if effort >= LOOKED_AT else min(index.nlist, int(np.ceil(index.nprobe * effort)))
        return _made.SearchParametersIVF(nprobe=probes, **chosen)


@register_index
@dataclass(frozen=True)
class ProductQuantizer(InvertedFile):
    """An inverted file of short codes, by default half a byte per dimension."""

    type: ClassVar[str] = "ivfpq"

    dimensions_per_byte: int = bounded(2, 1, 64)

    def _trained(
        self, sample: np.ndarray, num_docs: int, num_lists: int, after_round: Callable[[], None]
    ) -> faiss.Index:
        if num_docs < PQ_LEAST_DOCS:
            raise ConfigError(
                f"--type ivfpq: {num_docs} documents, needs at least {PQ_LEAST_DOCS} to learn its codes from; take flat"
            )
        codes = -(-sample.shape[1] // self.dimensions_per_byte)
        factory = f"Pad{codes * self.dimensions_per_byte},IVF{num_lists},PQ{codes}"
        index: Any = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        learning = lists.pq.cp
        learning.niter, learning.max_points_per_centroid = PQ_ROUNDS, PQ_POINTS
        index.train(sample)
        return index

    def _parameters(self, index: Any, top: int, chosen: dict[str, Any], effort: float) -> Any:
        lists = super()._parameters(faiss.extract_index_ivf(index), top, chosen, effort)
        return _made.SearchParametersPreTransform(index_params=lists)


def search_with(threads: int) -> None:
    """Have FAISS search with so many threads where this thread asks it to; every thread has a number of its own."""
    faiss.omp_set_num_threads(threads)


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
