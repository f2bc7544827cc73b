"""The documents that a Searcher searches: a FAISS folder, or a collection of a vector store."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError, UnavailableError
from bigdssm.features.conditions import Expression
from bigdssm.retrieval.filters import DocumentFilters, Filters, StoreFilters
from bigdssm.retrieval.index import SIMILAR_CANDIDATES, Index, cosine_similarities
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.retrieval.search import Query
from bigdssm.retrieval.vectors import truncate_like
from bigdssm.stores.base import Collection, ScoredDocument, Store, StoredVector


@dataclass(frozen=True)
class IndexDescription:
    """Identity of an index, for clients and metrics."""

    index: str  # type of the FAISS index, or scheme of the store
    documents: int
    dataset: str  # fingerprint
    published: float | None = None  # seconds since 1970
    store: str | None = None  # address without credentials
    collection: str | None = None
    version: int | None = None  # of the dataset


class DocumentIndex(ABC):
    """Documents of one model."""

    has_beta: bool
    filters: DocumentFilters | None  # None: filters need a dataset

    @property
    @abstractmethod
    def description(self) -> IndexDescription:
        """Return the identity of the index."""

    @abstractmethod
    def check_model(self, model: str) -> None:
        """Raise CheckpointError if the vectors are of a model other than `model`, a checksum."""

    @abstractmethod
    def of_dataset(self, dataset: Dataset) -> "DocumentIndex":
        """Return the index with its dataset. Raises CheckpointError: it is of another dataset."""

    @abstractmethod
    def query_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Convert vectors of the query tower to those of the index, float32 [m, width]."""

    @abstractmethod
    def search(self, vectors: np.ndarray, queries: Sequence[Query], top: int) -> list[list[ScoredDocument]]:
        """Return the `top` best documents per query, best first.

        vectors [m, D+1] are of the query tower, the queries have one filter. Raises UnavailableError: try again.
        """

    @abstractmethod
    def similar(self, key: str, top: int, exclude: Sequence[str]) -> list[ScoredDocument]:
        """Return the documents nearest to an existing one by cosine, ignoring beta, without the keys `exclude`."""

    @abstractmethod
    def vectors(self, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Return the vectors of the existing documents among `keys`."""


@dataclass(frozen=True)
class FolderIndex(DocumentIndex):
    """A FAISS folder; excluded and allowed documents are catalogue rows."""

    index: Index
    dataset: Dataset | None = None
    published: float | None = None
    filters: Filters | None = field(init=False)

    def __post_init__(self) -> None:
        num_docs = self.index.meta.num_docs
        filters = None if self.dataset is None else Filters(self.dataset.whole.catalogue, num_docs)
        object.__setattr__(self, "filters", filters)

    @property
    def has_beta(self) -> bool:  # type: ignore[override]
        """Whether vectors have a beta."""
        return self.index.meta.has_beta

    @property
    def description(self) -> IndexDescription:
        """Return the identity of the index."""
        meta = self.index.meta
        return IndexDescription(meta.kind, meta.num_docs, meta.dataset_fingerprint, self.published)

    def check_model(self, model: str) -> None:
        """Compare with the model of the index."""
        self.index.check_model(model)

    def of_dataset(self, dataset: Dataset) -> "FolderIndex":
        """Return the index with the withdrawals of its dataset."""
        return replace(self, index=self.index.of_dataset(dataset), dataset=dataset)

    def query_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Add a missing beta, and truncate."""
        return truncate_like(self.index.with_beta(vectors), self.index.meta)

    def search(self, vectors: np.ndarray, queries: Sequence[Query], top: int) -> list[list[ScoredDocument]]:
        """Search the FAISS index."""
        excluded = [query.excluded for query in queries]
        if self.dataset is None:
            excluded = [self.index.rows(query.exclude) if query.exclude else query.excluded for query in queries]
        allowed, top = queries[0].allowed, min(top, self.index.meta.num_docs)
        assert allowed is None or isinstance(allowed, AllowedDocuments)
        scores, rows = self.index.nearest(vectors, top, self.index.meta.model_checksum, excluded, allowed)
        return [self.index.documents(*result) for result in zip(scores, rows, strict=True)]

    def similar(self, key: str, top: int, exclude: Sequence[str]) -> list[ScoredDocument]:
        """Search the FAISS index."""
        excluded = self.index.rows(exclude) if exclude else np.zeros(0, np.int64)
        return self.index.documents(*self.index.similar(self.index.row(key), top, excluded))

    def vectors(self, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Read vectors from the index, with its precision."""
        rows = self.index.rows(keys) if self.dataset is None else self.dataset.catalogue.rows_by_key(keys)
        rows = np.unique(rows[(rows >= 0) & (rows < self.index.meta.num_docs)])
        vectors = self.index.vectors_at(rows)
        documents = self.index.documents(np.zeros(len(rows), np.float32), rows)
        return {
            document.key: StoredVector(document.title, vector)
            for document, vector in zip(documents, vectors, strict=True)
        }


@dataclass(frozen=True)
class StoreIndex(DocumentIndex):
    """A pinned collection of a vector store; excluded documents are keys.

    Documents may be newer or older than the dataset, which filters and histories are read from if there is one.
    """

    store: Store
    collection: Collection
    dataset: Dataset | None = None
    num_docs: int = -1
    filters: StoreFilters = field(init=False)

    def __post_init__(self) -> None:
        catalogue = None if self.dataset is None else self.dataset.whole.catalogue
        object.__setattr__(self, "filters", StoreFilters(self.collection.columns, catalogue))

    @classmethod
    def open(cls, store: Store, collection: Collection) -> "StoreIndex":
        """Return the index of a collection."""
        return cls(store, collection, num_docs=store.count(collection))

    @property
    def has_beta(self) -> bool:  # type: ignore[override]
        """Whether vectors have a beta."""
        return self.collection.has_beta

    @property
    def description(self) -> IndexDescription:
        """Return the identity of the index."""
        collection = self.collection
        return IndexDescription(
            self.store.scheme, self.num_docs, collection.dataset, collection.published, self.store.address,
            collection.name, collection.version,
        )  # fmt: skip

    def check_model(self, model: str) -> None:
        """Compare with the model of the collection; a search compares with that of every row."""
        self.collection.check_model(model)

    def of_dataset(self, dataset: Dataset) -> "StoreIndex":
        """Return the index with a dataset, from whose documents it may differ."""
        return replace(self, dataset=dataset)

    def query_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Truncate to the width of the collection."""
        return truncate_like(vectors, self.collection)

    def search(self, vectors: np.ndarray, queries: Sequence[Query], top: int) -> list[list[ScoredDocument]]:
        """Search the collection."""
        where: Expression | None = queries[0].allowed  # type: ignore[assignment]
        exclude = [list(query.exclude) for query in queries]
        if self.dataset is not None:
            exclude = [[*self.dataset.catalogue.keys(query.excluded), *query.exclude] for query in queries]
        with self._present():
            return self.store.search(self.collection, self.query_vectors(vectors), top, where, exclude)

    def similar(self, key: str, top: int, exclude: Sequence[str]) -> list[ScoredDocument]:
        """Re-rank the documents with the largest inner products by cosine. Raises DataError: no such document."""
        own = self.vectors([key])
        if key not in own:  # deleted since the caller read it
            raise DataError(f"no document has the key {key!r}")
        vector = own[key].vector
        query = vector.copy()[None]
        query[:, query.shape[1] - self.has_beta :] = 0
        candidates = SIMILAR_CANDIDATES * (top + 1)
        with self._present():
            (documents,) = self.store.search(self.collection, query, candidates, None, [[key, *exclude]])
        stored = self.vectors([document.key for document in documents])
        documents = [document for document in documents if document.key in stored]  # not deleted meanwhile
        others = np.stack([stored[document.key].vector for document in documents]) if documents else vector[None][:0]
        cosines = cosine_similarities(vector, others, self.has_beta)
        best = np.argsort(-cosines, kind="stable")[:top].tolist()
        return [ScoredDocument(float(cosines[i]), documents[i].key, documents[i].title) for i in best]

    def vectors(self, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Read vectors from the store."""
        with self._present():
            return self.store.vectors(self.collection, keys)

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Convert the error of a collection that was dropped while it is served."""
        try:
            yield
        except DataError as error:
            if isinstance(error, UnavailableError) or self.collection.name in self.store.collections():
                raise
            raise UnavailableError(
                f"{self.store.address}: collection {self.collection.name} was dropped while it was served; switch the "
                "alias before a collection is dropped"
            ) from None
