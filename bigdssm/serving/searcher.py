"""Searcher: answers requests with a model, its index and its dataset; independent of HTTP."""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigdssm.checkpoints.model_folder import META_FILE as MODEL_META
from bigdssm.checkpoints.model_folder import (
    ModelFolder,
    doc_checksum,
    load_model_folder,
    model_folders,
    model_identity,
    model_metas,
    read_model_meta,
)
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.partition import read_dataset_json
from bigdssm.dataset.remote import FileCache
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import CheckpointError, ConfigError, DataError, UnknownKeyError
from bigdssm.export.onnx_model import EXPORT_FILE, query_tower, run_onnx
from bigdssm.features import Column, histories_of, ragged, stored_features, texts_of
from bigdssm.loader.batch import to_features
from bigdssm.retrieval.embed import item_contents, query_vectors
from bigdssm.retrieval.index import DocumentIndex, StoreIndex, cosine_similarities, open_index
from bigdssm.retrieval.index_types import set_search_threads
from bigdssm.retrieval.queries import Queries, Query, first_users, times_of_requests
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.reranking import Reranker, Texts, check_reranking
from bigdssm.retrieval.vectors import META_FILE as INDEX_META
from bigdssm.stores.base import ScoredDocument, Store, StoredVector, is_store, open_named
from bigdssm.utils.arguments import check_utf8, checked
from bigdssm.utils.device import device_of, find_device
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

MOST_NEAR = 5  # items and words per explanation
MOST_WORDS = 64  # encoded per explanation
MAX_USERS_SHOWN = 1000
MAX_SEEN_SHOWN = 5
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class NearItem:
    """A similar document of the history."""

    key: str
    title: str
    cosine: float  # of its vector and the explained document's


@dataclass(frozen=True)
class NearWord:
    """A similar word of a text feature."""

    feature: str
    word: str
    cosine: float  # of the query with this word as its only text, and the explained document


@dataclass(frozen=True)
class Explanation:
    """The history items and query words most similar to a document. A similarity-based hint, not an attribution."""

    of: str  # title of the document
    history: list[NearItem]
    words: list[NearWord]


@dataclass(frozen=True)
class QueryVector:
    """A query as a vector, for a search in a store of one's own."""

    vector: list[float]  # with beta: 1 behind the others
    width: int
    metric: str  # the inner product with a published vector is the score of training
    scale: float  # alpha, which published vectors contain
    model: str  # checksum of the document tower, `doc_model` of a store


@dataclass(frozen=True)
class SearchResult:
    """Documents and timings of one query."""

    documents: list[ScoredDocument]  # best first
    encode_ms: float  # of the batch that the query was in
    search_ms: float
    rerank_ms: float  # 0 without re-ranking
    batch: int  # number of queries in it


class ModelSource(NamedTuple):
    """Folder and metadata of a loaded model."""

    folder: Path
    meta: dict[str, Any]
    export: bytes  # the metadata of the ONNX export


class Searcher:
    """Answers requests with a model and an index."""

    state: bytes | None = None  # `Folders.state` when it was opened
    source: ModelSource | None = None
    inode: int | None = None  # of the dataset's folder, read before it was opened; None: unknown, or a URL

    @checked
    def __init__(
        self, folder: ModelFolder, index: DocumentIndex, dataset: Dataset | None, threads: int | None = None,
        onnx: Path | None = None, rerank: int = 0, reranker: Path | None = None,
    ) -> None:  # fmt: skip
        """Users, histories and re-ranking need the dataset.

        `threads`: FAISS threads per search; default: FAISS's own. `onnx`: file of the query tower to encode with. The
        cross-encoder in the folder `reranker` re-ranks the best `rerank` documents. Raises: ConfigError: `threads` or
        `rerank` out of range, or `reranker` holds no cross-encoder, or the model has no texts for it; CheckpointError:
        the index or the dataset does not match the model; DataError: a dataset is required and missing.
        """
        check_reranking(rerank, reranker)
        if threads is not None and threads < 1:
            raise ConfigError(f"threads={threads}: needs at least 1")
        index.check_model(folder.doc_checksum)
        if dataset is not None:
            dataset = folder.view(dataset.with_rules(EventRules.of(folder.config.data)))
            index = index.of_dataset(dataset)
            if folder.model.content_ids:
                folder.model.set_contents(item_contents(folder.model, dataset, device_of(folder.model)))
        self._folder, self._index, self._dataset, self._threads = folder, index, dataset, threads
        self._tower = None if onnx is None else query_tower(onnx, folder.checksum, threads or 0)
        self._rerank = rerank
        self._reranker = None
        if reranker is not None:
            if dataset is None:
                raise DataError("re-ranking reads the documents' texts; give the dataset with --data")
            self._reranker = Reranker(reranker, Texts.of(dataset))
        self.queries = Queries(folder.schema, folder.tokenizer, dataset, folder.config.data.exclude_seen, index.filters)

    @classmethod
    @checked
    def open(
        cls, model: str | Path, index: str | Path, data: str | None = None, threads: int | None = None,
        onnx: Path | None = None, rerank: int = 0, reranker: str | Path | None = None, device: str = "cpu",
    ) -> "Searcher":  # fmt: skip
        """Open a model folder, an index and a dataset, by default the training dataset.

        `index` is a folder or a vector store, URL#NAME, where NAME is a collection or an alias (default: live). `model`
        may be a folder of model folders: that of the index is opened. If `data` is None and the model needs no dataset
        (no history, no re-ranking), none is opened. `device` is that of the query tower: auto, cpu or cuda[:INDEX].
        Raises ConfigError: no such device; CheckpointError, DataError: missing, damaged, or not
        matching the model.
        """
        cross_encoder = None if reranker is None else Path(reranker)
        return Folders(Path(model), index, data, threads, onnx, rerank, cross_encoder, device).open()

    def on(self, index: DocumentIndex) -> "Searcher":
        """Return a searcher of this model and dataset with another index. Raises CheckpointError: of another model."""
        index.check_model(self._folder.doc_checksum)
        other = copy(self)
        other._index = index if self._dataset is None else index.of_dataset(self._dataset)
        other.queries = copy(self.queries)
        other.queries.filters = other._index.filters
        return other

    @property
    def versions(self) -> tuple[str, str]:
        """Return the checksum of the model, and the description of the index as JSON."""
        described = {name: value for name, value in self._index.description.items() if value is not None}
        return self._folder.checksum, json.dumps(described)

    def dataset_state(self) -> tuple[int | None, int] | None:
        """Return the version of the dataset's folder: its inode (None: not compared) and number of partitions.

        An append adds partitions, `forget` replaces the folder. None without a dataset.
        """
        if self._dataset is None:
            return None
        inode = None if self.inode is None else _inode(self._dataset.dir)
        return inode, len(read_dataset_json(self._dataset.dir)["partitions"])

    def is_outdated(self) -> bool:
        """Return whether the dataset has been appended to, or its folder replaced, since it was opened."""
        if self._dataset is None or (state := self.dataset_state()) is None:
            return False
        inode, partitions = state
        return inode != self.inode or partitions > self._dataset.extents[0].partitions

    @property
    def identity(self) -> dict[str, Any]:
        """Return the checksum of the model, the description of the index, and its age in seconds."""
        description = self._index.description
        age_s = None if description["published"] is None else time.time() - description["published"]
        return {"model": self._folder.checksum, **description, "age_s": age_s}

    def about(self) -> dict[str, Any]:
        """Return a description of model, index, features and filters for clients."""
        schema = self._folder.schema
        provenance = self._folder.provenance
        weights = {key: provenance[key] for key in ("stage", "step", "initial", "queries") if key in provenance}
        return {
            **self.identity, "weights": weights, "score": self._folder.config.model.score,
            "exclude_seen": self._folder.config.data.exclude_seen,
            "features": {name: feature.type for name, feature in stored_features(schema.query).items()},
            "filters": {} if self.queries.filters is None else self.queries.filters.choices,
            "history": self.queries.has_history, "users": bool(self.users), "now": bool(times_of_requests(schema)),
        }  # fmt: skip

    @cached_property
    def users(self) -> list[str]:
        """Return the first users of the dataset; empty for a dataset of pairs."""
        if self._dataset is None or self._dataset.sequences is None:
            return []
        return first_users(self._dataset.sequences, MAX_USERS_SHOWN)

    def seen(self, query: Query) -> list[str]:
        """Return the titles of the newest documents of a query's events, newest first."""
        newest = query.seen[::-1][:MAX_SEEN_SHOWN]
        return self._dataset.catalogue.titles(newest) if self._dataset is not None else []

    def search(self, requests: Sequence[Request]) -> list[list[ScoredDocument]]:
        """Return the documents per request, best first. Raises as `queries.of`."""
        return [result.documents for result in self.answer([self.queries.of(request) for request in requests])]

    def answer(self, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer a batch of queries; the answers do not depend on the batch."""
        if not queries:
            return []
        started = time.perf_counter()
        vectors = self.encode(queries)
        if not np.isfinite(vectors).all():
            raise ConfigError("the vector of a query holds NaN or inf: a number of its features is too large")
        encoded = time.perf_counter()
        set_search_threads(self._threads)
        results: list[list[ScoredDocument]] = [[]] * len(queries)
        # Grouped by `top`, too: an approximate index probes more for a larger `top`.
        for allowed, requested in dict.fromkeys((query.allowed, query.top) for query in queries):
            members = [i for i, query in enumerate(queries) if query.allowed == allowed and query.top == requested]
            top = max(self._rerank, requested)
            results_of_group = self._index.search_queries(vectors[members], [queries[i] for i in members], top)
            for i, documents in zip(members, results_of_group, strict=True):
                results[i] = documents
        searched = time.perf_counter()
        if self._reranker is not None:
            assert self._dataset is not None
            rows = np.full((len(queries), max(len(documents[: self._rerank]) for documents in results)), -1)
            for i, documents in enumerate(results):
                keys = [document.key for document in documents[: self._rerank]]
                rows[i, : len(keys)] = self._dataset.catalogue.rows_by_key(keys)
            new = self._reranker.score(self._columns(queries), rows)
            for i, documents in enumerate(results):
                known = np.flatnonzero(rows[i] >= 0)  # a store may have newer documents than the dataset
                order = known[np.argsort(-new[i, known], kind="stable")].tolist()
                rest = np.setdiff1d(np.arange(len(documents)), order).tolist()  # behind those, in their order
                ranked_first = [documents[j]._replace(score=float(new[i, j])) for j in order]
                results[i] = [*ranked_first, *(documents[j] for j in rest)]
        ranked = time.perf_counter()
        encode_ms, search_ms, rerank_ms = ((b - a) * 1000 for a, b in pairwise((started, encoded, searched, ranked)))
        times = (encode_ms, search_ms, rerank_ms, len(queries))
        return [SearchResult(documents[: query.top], *times) for query, documents in zip(queries, results, strict=True)]

    def _columns(self, queries: Sequence[Query]) -> dict[str, Column]:
        return {name: ragged.concat([query.columns[name] for query in queries]) for name in queries[0].columns}

    def encode(self, queries: Sequence[Query]) -> np.ndarray:
        """Encode queries to index vectors, float32 [m, D+1]."""
        features = to_features(self._folder.schema.query, self._columns(queries))
        if self._tower is None:
            model = self._folder.model
            on_device = {name: values.to(device_of(model)) for name, values in features.items()}
            return query_vectors(model, on_device).cpu().numpy()
        vectors = run_onnx(self._tower, features)
        return np.asarray(vectors)[:, : self._folder.index_width]  # earlier exports always had [u, 1]

    def query_vector(self, request: Request) -> QueryVector:
        """Return the vector of a request, as wide as those of the index. Raises as `queries.of`."""
        vector = self._index.query_vectors(self.encode([self.queries.of(request)]))[0].tolist()
        return QueryVector(vector, len(vector), "inner product", self._folder.alpha, self._folder.doc_checksum)

    def similar(self, key: str, top: int, exclude: Sequence[str] = ()) -> tuple[str, list[ScoredDocument]]:
        """Return a document's title and its nearest documents but those with the keys `exclude`.

        Raises UnknownKeyError: no such document.
        """
        title, _ = self._document(key)
        check_utf8(exclude)
        set_search_threads(self._threads)
        return title, self._index.similar_documents(key, top, exclude)

    def why(self, request: Request, key: str) -> Explanation:
        """Explain a document by the most similar parts of a request. Raises as `queries.of` and `similar`."""
        query, (title, vector), schema = self.queries.of(request), self._document(key), self._folder.schema
        # The distinct events within the histories' `max_items`; the index may lack new documents.
        most = max((feature.max_items for feature in histories_of(schema.query).values()), default=0)
        rows = np.unique(query.seen[len(query.seen) - min(most, len(query.seen)) :])
        seen = {} if self._dataset is None else self._index.stored_vectors(self._dataset.catalogue.keys(rows))
        others = np.stack([stored.vector for stored in seen.values()]) if seen else vector[None][:0]
        cosines = cosine_similarities(vector, others, self._index.has_beta).tolist()
        near = [NearItem(other, seen[other].title, cosine) for other, cosine in zip(seen, cosines, strict=True)]
        items = sorted(near, key=lambda item: -item.cosine)[:MOST_NEAR]

        # The distinct words of the request's texts, each as the query's only text.
        given = request.features or {}
        texts = {name: given[name] for name in texts_of(schema.query) if isinstance(given.get(name), str)}
        every = ((name, word) for name, text in texts.items() for word in WORD.findall(text))
        near_words, words = [], list(dict.fromkeys(every))[:MOST_WORDS]
        if words:
            columns = [{**query.columns, name: self.queries.feature(name, word)} for name, word in words]
            vectors = self.encode([replace(query, columns=changed) for changed in columns])
            if vectors.shape[1] != len(vector):  # the index holds truncated vectors only
                vectors = self._index.query_vectors(vectors)
            of_words = cosine_similarities(vector, vectors, self._index.has_beta).tolist()
            near_words = [NearWord(*word, cosine) for word, cosine in zip(words, of_words, strict=True)]
        best_words = sorted(near_words, key=lambda word: -word.cosine)[:MOST_NEAR]
        return Explanation(title, items, best_words)

    def _document(self, key: str) -> StoredVector:
        """Return title and vector of a document. Raises UnknownKeyError: no document has this key."""
        check_utf8([key])
        stored = self._index.stored_vectors([key])
        if key not in stored:
            raise UnknownKeyError(f"no document has the key {key!r}")
        return stored[key]


@dataclass(frozen=True)
class Folders:
    """Paths and options of a Searcher, which can be reopened."""

    model: Path  # a model folder, or a folder of model folders
    index: str | Path  # a folder, or a store: URL#NAME
    data: str | None = None
    threads: int | None = None
    onnx: Path | None = None  # file of the query tower to encode with
    rerank: int = 0  # documents that the cross-encoder re-ranks
    reranker: Path | None = None  # folder of the cross-encoder
    device: str = "cpu"  # of the query tower

    def open(self, current: Searcher | None = None) -> Searcher:
        """Open the current content; model and dataset of `current` are reused if they have not changed.

        Raises as `Searcher.open` does.
        """
        state = self.state()  # read first, so that a concurrent replacement is detected
        source, index = self._pair(None if current is None else current.source)
        if current is not None and current.source == source and not current.is_outdated():
            searcher = current.on(index)
        else:
            searcher = self._searcher(source.folder, index)
        searcher.state, searcher.source = state, source
        return searcher

    def open_model(self, checksum: str) -> Searcher | None:
        """Open the model with this checksum, with an index of its vectors; None if there is no such model or index.

        Of a store, that is a collection that the name or alias has or had, or else the newest one.
        """
        for folder, meta in reversed(list(model_metas(self.model))):
            if model_identity(meta) == checksum:
                index = self._index_of(doc_checksum(meta))
                return None if index is None else self._searcher(folder, index)
        return None

    def _index_of(self, model: str) -> DocumentIndex | None:
        """Return the index of the vectors of a model, given its `doc_checksum`, or None."""
        if self._named is None:
            index = open_index(self.index)
            return index if index.meta.model_checksum == model else None
        store, name = self._named
        newest_first = sorted(store.collections().values(), key=lambda collection: -collection.published)
        for collection in [*store.named(name), *newest_first]:
            if collection.model == model and collection.published:
                return StoreIndex(store, collection, store.count(collection))
        return None

    def _searcher(self, model: Path, index: DocumentIndex) -> Searcher:
        """Load a model folder, and open the dataset if the model or an option needs it."""
        folder, dataset, inode = load_model_folder(model, find_device(self.device)), None, None
        if self.data is not None or histories_of(folder.schema.query) or folder.schema.siamese or self.rerank:
            cache = FileCache.from_config(folder.config.data)
            where = self.data or folder.config.data.dir
            inode = _inode(where)  # first, so that a concurrent replacement is detected
            dataset = Dataset.open(where, cache=cache)
        searcher = Searcher(folder, index, dataset, self.threads, self.onnx, self.rerank, self.reranker)
        searcher.inode = inode
        return searcher

    def state(self) -> bytes:
        """Return a digest that changes when a folder is replaced, an alias switched, or a collection published.

        The metas contain all checksums. Raises UnavailableError, DataError: the store does not answer.
        """
        digest = hashlib.sha256()
        models = [folder / MODEL_META for folder in model_folders(self.model)]
        for path in (*models, Path(self.index) / INDEX_META):
            with suppress(OSError):
                digest.update(path.read_bytes())
        digest.update(self._export)
        if self._named is not None:
            store, name = self._named
            digest.update(repr(store.named(name)).encode())
        return digest.digest()

    @cached_property
    def _named(self) -> tuple[Store, str] | None:
        return open_named(str(self.index)) if is_store(self.index) else None

    @property
    def _export(self) -> bytes:
        with suppress(OSError):
            return b"" if self.onnx is None else (self.onnx.parent / EXPORT_FILE).read_bytes()
        return b""

    def _pair(self, loaded: ModelSource | None) -> tuple[ModelSource, DocumentIndex]:
        """Return the index and the last model folder by name of its model.

        Of an alias, the collection is that which it names, or else the one before. A `loaded` model serves a collection
        after its folder was replaced. Raises CheckpointError: there is no model for either.
        """
        models: dict[str, ModelSource] = {}
        for folder, meta in model_metas(self.model):
            models[doc_checksum(meta)] = ModelSource(folder, meta, self._export)
        if loaded is not None and self._named is not None:
            models.setdefault(doc_checksum(loaded.meta), loaded)
        if not models:
            read_model_meta(self.model)  # raises
        if self._named is None:
            index = replace(open_index(self.index), published=(Path(self.index) / INDEX_META).stat().st_mtime)
            model, where = index.meta.model_checksum, f"the index {self.index}"
            if model in models:
                return models[model], index
        else:
            store, name = self._named
            collections = store.named(name)
            model, where = collections[0].model, f"{store.address}: {name}, collection {collections[0].name}"
            for collection in collections:
                if collection.model in models:
                    if collection != collections[0]:
                        logger.warning(
                            "%s holds vectors of model %s, which %s is not: serving the previous collection, %s",
                            where, model[:12], self.model, collection.name,
                        )  # fmt: skip
                    return models[collection.model], StoreIndex(store, collection, store.count(collection))
        raise CheckpointError(
            f"{where} holds vectors of model {model[:12]}, --model {self.model} is "
            f"{', '.join(one[:12] for one in models)}; embed and index or publish with the model in use"
        )


def _inode(folder: str | Path) -> int | None:
    """Return the inode of a folder; None: a URL, or missing."""
    with suppress(OSError):
        return os.stat(folder).st_ino
    return None
