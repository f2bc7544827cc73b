"""Searcher: answers requests with a model, its index and its dataset; independent of HTTP."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bigdssm.checkpoints.model_folder import META_FILE as MODEL_META
from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder
from bigdssm.dataset.catalogue import NO_ROWS
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.event_rules import EventRules
from bigdssm.dataset.partition import read_dataset_json
from bigdssm.dataset.remote import FileCache
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.export.onnx_model import EXPORT_FILE, query_tower, run_onnx
from bigdssm.features import Column, TextTokenizer, histories_of, ragged, stored_features, texts_of
from bigdssm.loader.batch import to_features
from bigdssm.retrieval.embed import item_contents, query_vectors
from bigdssm.retrieval.index import Index, ScoredDocument, cosine_similarities, open_index
from bigdssm.retrieval.index_types import set_search_threads
from bigdssm.retrieval.pair_scorer import PairScorer
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.search import Queries, Query, first_users, times_of_requests
from bigdssm.retrieval.vectors import META_FILE as INDEX_META
from bigdssm.retrieval.vectors import truncate_like
from bigdssm.utils.arguments import checked

MOST_NEAR = 5  # items and words per explanation
MOST_WORDS = 64  # encoded per explanation
MOST_USERS_LISTED = 1000
SEEN_LISTED = 5
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
class SearchResult:
    """Documents and timings of one query."""

    documents: list[ScoredDocument]  # best first
    encode_ms: float  # of the batch that the query was in
    search_ms: float
    rerank_ms: float  # 0 without re-ranking
    batch: int  # number of queries in it


class Searcher:
    """Answers requests with a model and an index."""

    state: bytes | None = None  # `Folders.state` when it was opened

    @checked
    def __init__(
        self, folder: ModelFolder, index: Index, dataset: Dataset | None, threads: int | None = None,
        onnx: Path | None = None, rerank: int = 0,
    ) -> None:  # fmt: skip
        """Users, histories and re-ranking need the dataset.

        `threads`: FAISS threads per search; default: FAISS's own. `onnx`: file of the query tower to encode with. The
        model's scorer re-ranks the best `rerank` documents. Raises: ConfigError: `threads` or `rerank` out of range;
        CheckpointError: the index or the dataset does not match the model, or the model has no scorer; DataError: a
        dataset is required and missing.
        """
        if rerank < 0 or rerank == 1:
            raise ConfigError(f"rerank={rerank}: needs at least 2 documents, or 0 for none")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads={threads}: needs at least 1")
        if index.meta.model_checksum != folder.doc_checksum:
            raise CheckpointError(
                f"the index holds vectors of model {index.meta.model_checksum[:12]}, --model is "
                f"{folder.doc_checksum[:12]}; embed and index with the served model"
            )
        if dataset is not None:
            dataset = folder.view(dataset.with_rules(EventRules.of(folder.config.data)))
            index = index.of_dataset(dataset)
            if folder.model.content_ids:
                folder.model.set_contents(item_contents(folder.model, dataset))
        self._folder, self._index, self._dataset, self._threads = folder, index, dataset, threads
        self._tower = None if onnx is None else query_tower(onnx, folder.checksum, threads or 0)
        self._rerank, self._scorer = rerank, None
        if rerank:
            if dataset is None:
                raise DataError("a scorer needs the documents' features; give the dataset with --data")
            self._scorer = PairScorer.from_folder(folder, dataset)
            self._scorer.require_scorer()
        tokenizer = None if folder.tokenizer_dir is None else TextTokenizer(folder.tokenizer_dir)
        self.queries = Queries(folder.schema, tokenizer, dataset, folder.config.data.exclude_seen, index.meta.num_docs)

    @classmethod
    @checked
    def open(
        cls, model: str | Path, index: str | Path, data: str | None = None, threads: int | None = None,
        onnx: Path | None = None, rerank: int = 0,
    ) -> Searcher:  # fmt: skip
        """Open a model folder, an index folder and a dataset, by default the training dataset.

        If `data` is None and the model needs no dataset (no history, no re-ranking), none is opened. Raises
        CheckpointError, DataError: missing, damaged, or not matching the model.
        """
        folder, opened = load_model_folder(Path(model)), open_index(index)
        if data is None and not (histories_of(folder.schema.query) or folder.schema.siamese or rerank):
            return cls(folder, opened, None, threads, onnx)
        dataset = Dataset.open(data or folder.config.data.dir, cache=FileCache.from_config(folder.config.data))
        return cls(folder, opened, dataset, threads, onnx, rerank)

    def is_outdated(self) -> bool:
        """Return whether partitions have been added to the dataset since it was opened."""
        dataset = self._dataset
        return dataset is not None and len(read_dataset_json(dataset.dir)["partitions"]) > dataset.extents[0].partitions

    def about(self) -> dict[str, Any]:
        """Return a description of model, index, features and filters for clients."""
        meta = self._index.meta
        schema = self._folder.schema
        return {
            "model": self._folder.checksum, "index": meta.kind, "documents": meta.num_docs,
            "score": self._folder.config.model.score, "exclude_seen": self._folder.config.data.exclude_seen,
            "features": {name: feature.type for name, feature in stored_features(schema.query).items()},
            "filters": self.queries.choices,
            "history": self.queries.has_history, "users": bool(self.users), "now": bool(times_of_requests(schema)),
        }  # fmt: skip

    @cached_property
    def users(self) -> list[str]:
        """Return the first users of the dataset; empty for a dataset of pairs."""
        if self._dataset is None or self._dataset.sequences is None:
            return []
        return first_users(self._dataset.sequences, MOST_USERS_LISTED)

    def seen(self, query: Query) -> list[str]:
        """Return the titles of the newest documents of a query's events, newest first."""
        newest = query.seen[::-1][:SEEN_LISTED]
        return self._dataset.catalogue.titles(newest) if self._dataset is not None else []

    def search(self, requests: Sequence[Request]) -> list[list[ScoredDocument]]:
        """Return the documents per request, best first. Raises: ConfigError, DataError: a request is invalid."""
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
        self._use_threads()
        results = [(np.zeros(0, np.float32), np.zeros(0, np.int64))] * len(queries)
        # Grouped by `top`, too: an approximate index probes more for a larger `top`.
        for allowed, requested in dict.fromkeys((query.allowed, query.top) for query in queries):
            members = [i for i, query in enumerate(queries) if query.allowed is allowed and query.top == requested]
            group = [queries[i] for i in members]
            top = min(max(self._rerank, requested), self._index.meta.num_docs)
            scores, rows = self._index.nearest(
                vectors[members], top, self._folder.doc_checksum, [query.excluded for query in group], allowed,
            )  # fmt: skip
            for i, *result in zip(members, scores, rows, strict=True):
                results[i] = result[0], result[1]
        searched = time.perf_counter()
        if self._scorer is not None:
            documents = np.full((len(queries), max(len(rows[: self._rerank]) for _, rows in results)), -1)
            for i, (_, rows) in enumerate(results):
                documents[i, : len(rows)] = rows[: self._rerank]
            new = self._scorer.score(self._columns(queries), documents)
            for i, (scores, rows) in enumerate(results):
                by_scorer = new[i, : min(len(rows), self._rerank)]
                order = np.argsort(-by_scorer, kind="stable")
                rest = slice(len(order), None)  # keeps its order behind the others
                results[i] = np.concatenate([by_scorer[order], scores[rest]]), np.concatenate([rows[order], rows[rest]])
        ranked = time.perf_counter()
        encode_ms, search_ms, rerank_ms = ((b - a) * 1000 for a, b in pairwise((started, encoded, searched, ranked)))
        times = (encode_ms, search_ms, rerank_ms, len(queries))
        return [
            SearchResult(self._index.documents(scores[: query.top], rows[: query.top]), *times)
            for query, (scores, rows) in zip(queries, results, strict=True)
        ]

    def _columns(self, queries: Sequence[Query]) -> dict[str, Column]:
        return {name: ragged.concat([query.columns[name] for query in queries]) for name in queries[0].columns}

    def encode(self, queries: Sequence[Query]) -> np.ndarray:
        """Encode queries to index vectors, float32 [m, D+1]."""
        features = to_features(self._folder.schema.query, self._columns(queries))
        vectors = (
            query_vectors(self._folder.model, features) if self._tower is None else run_onnx(self._tower, features)
        )
        return np.asarray(vectors)[:, : self._folder.index_width]  # earlier exports always had [u, 1]

    def similar(self, key: str, top: int, exclude: Sequence[str] = ()) -> tuple[str, list[ScoredDocument]]:
        """Return a document's title and its nearest documents but those with the keys `exclude`.

        Raises DataError: no such document.
        """
        row, excluded = self._index.row(key), self._index.rows(exclude) if exclude else NO_ROWS
        self._use_threads()
        return self._index.title[row].as_py(), self._index.documents(*self._index.similar(row, top, excluded))

    def why(self, request: Request, key: str) -> Explanation:
        """Explain a document by the most similar parts of a request. Raises as `queries.of` and `similar`."""
        query, row = self.queries.of(request), self._index.row(key)
        vector, schema = self._index.vectors_at([row])[0], self._folder.schema
        # The distinct events within the histories' `max_items`; the index may lack new documents.
        most = max((feature.max_items for feature in histories_of(schema.query).values()), default=0)
        rows = np.unique(query.seen[len(query.seen) - min(most, len(query.seen)) :])
        rows = rows[rows < self._index.meta.num_docs]
        cosines = cosine_similarities(vector, self._index.vectors_at(rows), self._index.meta.has_beta)
        nearest = np.argsort(-cosines, kind="stable")[:MOST_NEAR]
        near = self._index.documents(cosines[nearest], rows[nearest])
        items = [NearItem(document.key, document.title, document.score) for document in near]

        # The distinct words of the request's texts, each as the query's only text.
        given = request.features or {}
        texts = {name: given[name] for name in texts_of(schema.query) if isinstance(given.get(name), str)}
        every = ((name, word) for name, text in texts.items() for word in WORD.findall(text))
        near_words, words = [], list(dict.fromkeys(every))[:MOST_WORDS]
        if words:
            columns = [{**query.columns, name: self.queries.feature(name, word)} for name, word in words]
            vectors = self.encode([replace(query, columns=some) for some in columns])
            if vectors.shape[1] != len(vector):  # the index holds truncated vectors only
                vectors = truncate_like(self._index.with_beta(vectors), self._index.meta)
            of_words = cosine_similarities(vector, vectors, self._index.meta.has_beta).tolist()
            near_words = [NearWord(*word, cosine) for word, cosine in zip(words, of_words, strict=True)]
        best_words = sorted(near_words, key=lambda word: -word.cosine)[:MOST_NEAR]
        return Explanation(self._index.title[row].as_py(), items, best_words)

    def _use_threads(self) -> None:
        if self._threads is not None:
            set_search_threads(self._threads)


@dataclass(frozen=True)
class Folders:
    """Paths and options of a Searcher, which can be reopened."""

    model: Path
    index: Path
    data: str | None = None
    threads: int | None = None
    onnx: Path | None = None  # file of the query tower to encode with
    rerank: int = 0  # documents that the model's scorer re-ranks

    def open(self) -> Searcher:
        """Open the current content. Raises as `Searcher.open` does."""
        state = self.state()  # read first, so that a concurrent replacement is detected
        searcher = Searcher.open(self.model, self.index, self.data, self.threads, self.onnx, self.rerank)
        searcher.state = state
        return searcher

    def state(self) -> bytes:
        """Return a digest that changes when a folder is replaced; the metas contain all checksums."""
        digest = hashlib.sha256()
        exported = [] if self.onnx is None else [self.onnx.parent / EXPORT_FILE]
        for path in (self.model / MODEL_META, self.index / INDEX_META, *exported):
            with suppress(OSError):
                digest.update(path.read_bytes())
        return digest.digest()
